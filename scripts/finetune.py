"""Finetune an image classifier on a dataset: on clean images by default, since robustness comes along from pretraining.

    accelerate launch scripts/finetune.py --model_name_or_path user/repo --dataset_name uoft-cs/cifar10 --output_dir my-model

On CPUs, several processes take `torchrun --nproc_per_node 2 scripts/finetune.py ...` (`accelerate launch --cpu` starts one).
A model that was not pretrained on noisy images takes `--sigmas 0 0.25 0.5 1`, whatever its kind.
`--resume_from_checkpoint latest` goes on where a training was cut short, and ends with the weights it would have had.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

from hf_smoothing.core.modeling_mixed_noise_vit import MixedNoiseViTForImageClassification
from hf_smoothing.hub.model_cards import begin as begin_card
from hf_smoothing.hub.push import HubSettings
from hf_smoothing.training.classifier_training import EvaluationSettings, head_of, load_to_finetune, train_classifier
from hf_smoothing.training.training_images import ImageSettings, names_of_classes
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser


@dataclass
class BaseSettings:
    """What to start from."""

    model_name_or_path: str = HfArg(
        help="image classifier on the Hub or in a local folder, best a mixed-noise ViT, or the name of a ViT of timm"
    )
    revision: str | None = HfArg(default=None, help="revision of the model: a branch, tag or commit")
    freeze_backbone: bool = HfArg(default=False, help="train the head alone (linear probe)")
    drop_path_rate: float = HfArg(default=0.0, help="stochastic depth")


def main() -> None:
    parser = argument_parser((BaseSettings, ImageSettings, TrainingSettings, EvaluationSettings, HubSettings), __doc__)
    parser.set_defaults(learning_rate=5e-4, layer_decay=0.75)
    try:
        base, image_settings, settings, evaluation, hub = parser.parse_args_into_dataclasses()
        accelerator = settings.start()
        hub.prepare(settings.output_dir, accelerator)
        with accelerator.main_process_first():  # one downloads, the others find it there
            images = image_settings.open()
            torch.manual_seed(settings.seed)  # of the head
            model, processor = load_to_finetune(
                base.model_name_or_path,
                names_of_classes(images),
                revision=base.revision,
                drop_path_rate=base.drop_path_rate,
            )
        if base.freeze_backbone:
            model.requires_grad_(False)
            head_of(model).requires_grad_(True)
        if not isinstance(model, MixedNoiseViTForImageClassification):
            settings.layer_decay = 1.0  # the layers of other models are not known
        train_classifier(
            model, images, image_settings, settings, evaluation, accelerator, base.model_name_or_path, processor
        )
        if accelerator.is_main_process:
            begin_card(
                Path(settings.output_dir),
                summary=f"A {model.config.model_type.replace('_', '-')} model, finetuned.",
                dataset=image_settings.dataset_name,
                base_model=base.model_name_or_path,
            )
        hub.publish(settings.output_dir, accelerator)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
