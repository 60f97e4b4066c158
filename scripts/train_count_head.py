"""Train a count head: it predicts from one clean pass how often each class comes out under noise (arXiv 2402.07498).

    accelerate launch scripts/certify.py --model_name_or_path my-model --dataset_name uoft-cs/cifar10 --split train \\
        --sigma 0.25 0.5 1 --method counts --n 8 --output_dir counts
    accelerate launch scripts/train_count_head.py --model_name_or_path my-model --counts counts --output_dir my-counts \\
        --loss logistic_normal --own_backbone --learning_rate 5e-4

The first command counts, on the training split, and can be stopped and gone on with. What the head says is an estimate.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

from hf_smoothing.core.modeling_count_prediction import LOSSES
from hf_smoothing.count_head.count_training import build_count_model, train_count_head
from hf_smoothing.count_head.measured_counts import read_counts
from hf_smoothing.hub.model_cards import begin as begin_card
from hf_smoothing.hub.push import HubSettings
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser


@dataclass
class CountHeadSettings:
    """What to train."""

    model_name_or_path: str = HfArg(help="mixed-noise ViT whose encoder and classifier the head starts from")
    counts: str = HfArg(help="folder of a finished run of --method counts")
    loss: str = HfArg(
        default="jensen_shannon", help="jensen_shannon, cross_entropy, kl, or logistic_normal, which suits few draws"
    )
    own_backbone: bool = HfArg(default=False, help="train encoder and classifier along, instead of the head alone")
    hflip: float = HfArg(
        default=0.5,
        help="with own_backbone: probability that an image is flipped from left to right, whose counts are taken to be the "
        "same; 0 for digits and letters",
    )
    eval_share: float = HfArg(
        default=0.05, help="share of the images held out, to look at the errors after each epoch"
    )

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is unknown: use {', '.join(LOSSES)}.")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip={self.hflip:g} must be a probability, between 0 and 1.")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} must be 0 or above, and below 1.")


def main() -> None:
    parser = argument_parser((CountHeadSettings, TrainingSettings, HubSettings), __doc__)
    parser.set_defaults(learning_rate=1e-3, per_device_train_batch_size=128)
    try:
        head, settings, hub = parser.parse_args_into_dataclasses()
        accelerator = settings.start()
        hub.prepare(settings.output_dir, accelerator)
        counts = read_counts(Path(head.counts))
        torch.manual_seed(settings.seed)
        model = build_count_model(head.model_name_or_path, counts, head.own_backbone)
        train_count_head(
            model,
            counts,
            settings,
            accelerator,
            base=head.model_name_or_path,
            loss=head.loss,
            own_backbone=head.own_backbone,
            hflip=head.hflip,
            eval_share=head.eval_share,
        )
        if accelerator.is_main_process:
            begin_card(
                Path(settings.output_dir),
                summary="A count head: what noisy copies of an image would be taken for, from one clean pass.",
                dataset=counts.settings["dataset_name"],
                base_model=head.model_name_or_path,
                sources=["Accelerated Smoothing (arXiv 2402.07498)"],
            )
        hub.publish(settings.output_dir, accelerator)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
