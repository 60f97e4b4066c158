"""Train a count head. It predicts from the clean image how often noisy copies get each class (arXiv 2402.07498).

Example:
    accelerate launch scripts/certify.py --model_name_or_path my-model --dataset_name uoft-cs/cifar10 --split train \\
        --sigma 0.25 0.5 1 --method counts --n 8 --output_dir counts
    accelerate launch scripts/train_count_head.py --model_name_or_path my-model --counts counts --output_dir my-counts \\
        --loss logistic_normal --own_backbone --learning_rate 5e-4

The first command measures counts on the training split; the second trains a head to predict them. The predictions of a
head are estimates, not certificates.

Counts that somebody else measured are a Parquet file with the columns index, sigma and counts:
    accelerate launch scripts/train_count_head.py --model_name_or_path my-model --counts train.parquet \\
        --dataset_name uoft-cs/cifar10 --split train --loss probit --own_backbone --output_dir my-counts
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

from hf_smoothing.count_head.measured_counts import MeasuredCounts, read_count_table, read_counts
from hf_smoothing.count_head.training import CountHeadSettings, build_count_model, train_count_head
from hf_smoothing.hub.model_cards import create_card
from hf_smoothing.hub.push import HubSettings
from hf_smoothing.training.training_log import describe_training
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error


@dataclass
class DataSettings:
    """The training data."""

    counts: str = HfArg(
        help="folder of a finished run of scripts/certify.py with --method counts (or fixed); or a Parquet file with the "
        "columns index, sigma and counts"
    )
    dataset_name: str | None = HfArg(
        default=None, help="dataset of the images that a Parquet file counts: name on the Hub, local folder, or file"
    )
    split: str = HfArg(default="train", help="split of the images that a Parquet file counts")
    sigmas: list[float] | None = HfArg(default=None, help="noise levels to train on (default: all that were counted)")

    def read(self) -> MeasuredCounts:
        """Read the counts. Raises a `ValueError` where they cannot be read, or the dataset of a table is not named."""
        if not self.counts.endswith(".parquet"):
            counts = read_counts(Path(self.counts))
        elif self.dataset_name is None:
            raise ValueError(f"{self.counts} does not say which images it counts: give dataset_name and split.")
        else:
            counts = read_count_table(Path(self.counts), self.dataset_name, self.split)
        return counts if self.sigmas is None else counts.select_sigmas(self.sigmas)


def main() -> None:
    parser = argument_parser((DataSettings, CountHeadSettings, TrainingSettings, HubSettings), __doc__)
    parser.set_defaults(learning_rate=1e-3)
    with exit_on_error():
        data, head, settings, hub = parser.parse_args_into_dataclasses()
        accelerator = settings.create_accelerator()
        hub.prepare(settings.output_dir, accelerator)
        counts = data.read()
        torch.manual_seed(settings.seed)
        model = build_count_model(head, counts)
        results = train_count_head(model, counts, head, settings, accelerator)
        if accelerator.is_main_process:
            create_card(
                Path(settings.output_dir),
                summary="A count head: it predicts from one clean pass how often each class is the answer under noise.",
                dataset=counts.settings["dataset_name"],
                base_model=head.model_name_or_path,
                sources=["[Accelerated Smoothing](https://arxiv.org/abs/2402.07498)"],
            )
        accelerator.print(describe_training(results, settings.output_dir))
        hub.publish(settings.output_dir, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
