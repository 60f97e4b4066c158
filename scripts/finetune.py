"""Finetune an image classifier on a dataset. By default the images are clean: a mixed-noise ViT stays robust to noise.

Examples:
    accelerate launch scripts/finetune.py --model_name_or_path user/repo --dataset_name uoft-cs/cifar10 --output_dir my-model
    accelerate launch scripts/finetune.py --model_name_or_path microsoft/resnet-18 --dataset_name uoft-cs/cifar10 \\
        --sigmas 0 0.25 0.5 1 --output_dir my-resnet

The second command adds noise: a model that was not pretrained on noisy images needs it.
If a training was interrupted, run its command again with `--resume_from_checkpoint latest`: the model gets the weights that
it would get without the interruption. On CPUs, start several processes with
`torchrun --nproc_per_node 2 scripts/finetune.py ...`, because `accelerate launch --cpu` starts only one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

from hf_smoothing.core.modeling_mixed_noise_vit import MixedNoiseViTForImageClassification
from hf_smoothing.hub.model_cards import create_card
from hf_smoothing.hub.push import HubSettings
from hf_smoothing.training.classifier_training import train_classifier
from hf_smoothing.training.evaluation import EvaluationSettings
from hf_smoothing.training.pretrained_classifiers import find_head, load_for_finetuning
from hf_smoothing.training.training_images import ImageSettings, find_class_names
from hf_smoothing.training.training_log import describe_training
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error


@dataclass
class BaseSettings:
    """The pretrained model."""

    model_name_or_path: str = HfArg(
        help="image classifier on the Hub or in a local folder, preferably a mixed-noise ViT, or the name of a timm ViT"
    )
    revision: str | None = HfArg(default=None, help="revision of the model on the Hub: a branch, tag or commit")
    freeze_backbone: bool = HfArg(default=False, help="train only the head (linear probe)")
    drop_path_rate: float = HfArg(default=0.0, help="rate of stochastic depth")
    base_share: float = HfArg(
        default=0.0,
        help="share of the pretrained weights, without the head, in the saved ones: keeps more robustness to noise, and "
        "costs accuracy on clean images; try 0.25 (arXiv 2109.01903)",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.base_share < 1:
            raise ValueError(f"base_share={self.base_share} must be 0 or above, and below 1.")
        if self.base_share and self.freeze_backbone:
            raise ValueError("base_share does nothing with freeze_backbone, which trains only the head: choose one.")


def main() -> None:
    parser = argument_parser((BaseSettings, ImageSettings, TrainingSettings, EvaluationSettings, HubSettings), __doc__)
    parser.set_defaults(learning_rate=5e-4, layer_decay=0.75)
    with exit_on_error():
        base, image_settings, settings, evaluation, hub = parser.parse_args_into_dataclasses()
        accelerator = settings.create_accelerator()
        hub.prepare(settings.output_dir, accelerator)
        with accelerator.main_process_first():  # the main process downloads, the others read its cache
            images = image_settings.open()
            torch.manual_seed(settings.seed)  # for a reinitialized head
            model, processor = load_for_finetuning(
                base.model_name_or_path,
                find_class_names(images),
                revision=base.revision,
                drop_path_rate=base.drop_path_rate,
            )
        if base.freeze_backbone:
            model.requires_grad_(False)
            find_head(model).requires_grad_(True)
        if not isinstance(model, MixedNoiseViTForImageClassification):
            settings.layer_decay = 1.0  # the order of their layers is unknown
        results = train_classifier(
            model,
            images,
            image_settings,
            settings,
            evaluation,
            accelerator,
            base.model_name_or_path,
            processor,
            base.base_share,
        )
        if accelerator.is_main_process:
            create_card(
                Path(settings.output_dir),
                dataset=image_settings.dataset_name,
                base_model=base.model_name_or_path,
            )
        accelerator.print(describe_training(results, settings.output_dir))
        hub.publish(settings.output_dir, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
