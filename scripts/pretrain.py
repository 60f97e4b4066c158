"""Pretrain a mixed-noise ViT from scratch: noise of a level drawn for each image, so that one model serves them all.

    accelerate launch scripts/pretrain.py --dataset_name uoft-cs/cifar10 --sigmas 0 0.25 0.5 1 --output_dir my-model

On CPUs, several processes take `torchrun --nproc_per_node 2 scripts/pretrain.py ...` (`accelerate launch --cpu` starts one).
`--resume_from_checkpoint latest` goes on where a training was cut short, and ends with the weights it would have had.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.hf_argparser import HfArg

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification
from hf_smoothing.data.labelled_images import LabelledImages
from hf_smoothing.hub.model_cards import begin as begin_card
from hf_smoothing.hub.push import HubSettings
from hf_smoothing.training.classifier_training import EvaluationSettings, train_classifier
from hf_smoothing.training.training_images import ImageSettings, names_of_classes
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser


@dataclass
class MixtureSettings(ImageSettings):
    sigmas: list[float] = HfArg(
        default_factory=lambda: [0.0, 0.25, 0.5, 1.0], help="noise levels, in [0, 1] pixels, drawn for each image"
    )


@dataclass
class ModelSettings:
    """The model to build, see MixedNoiseViTConfig."""

    image_size: int = HfArg(default=32, help="pixels a side; images are resized to it")
    patch_size: int = HfArg(default=4, help="pixels a side of a token")
    hidden_size: int = HfArg(default=128, help="width of the transformer")
    num_hidden_layers: int = HfArg(default=4, help="its blocks")
    num_attention_heads: int = HfArg(default=4, help="its attention heads")
    stem: str = HfArg(default="conv", help="conv or patch")
    norm_layer: str = HfArg(default="layernorm", help="layernorm, or batchnorm for ablations")
    drop_path_rate: float = HfArg(default=0.0, help="stochastic depth")


def normalisation(images: LabelledImages, samples: int = 1000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over some of the images."""
    total = images.total
    step = 1 if total is None else max(1, total // samples)
    moments: list[tuple[torch.Tensor, torch.Tensor]] = []
    for position, (_, read) in enumerate(images.rows()):
        if len(moments) == samples:
            break
        if position % step == 0:
            picture = images.picture(read())
            flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(-1, 3).float() / 255
            moments.append((flat.mean(0), flat.square().mean(0)))
    mean, square = (torch.stack(one).mean(0) for one in zip(*moments))
    return mean.tolist(), (square - mean.square()).sqrt().tolist()


def main() -> None:
    parser = argument_parser(
        (ModelSettings, MixtureSettings, TrainingSettings, EvaluationSettings, HubSettings), __doc__
    )
    try:
        model_settings, image_settings, settings, evaluation, hub = parser.parse_args_into_dataclasses()
        accelerator = settings.start()
        hub.prepare(settings.output_dir, accelerator)
        with accelerator.main_process_first():  # one downloads, the others find it there
            images = image_settings.open()
        names = names_of_classes(images)
        mean, std = normalisation(images)
        torch.manual_seed(settings.seed)
        config = MixedNoiseViTConfig(
            **vars(model_settings),
            image_mean=mean,
            image_std=std,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        model = MixedNoiseViTForImageClassification(config)
        train_classifier(model, images, image_settings, settings, evaluation, accelerator)
        if accelerator.is_main_process:
            begin_card(
                Path(settings.output_dir),
                summary="A mixed-noise vision transformer, pretrained on a mixture of noise levels.",
                dataset=image_settings.dataset_name,
            )
        hub.publish(settings.output_dir, accelerator)
    except (OSError, ValueError, FloatingPointError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
