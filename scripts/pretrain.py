"""Pretrain a mixed-noise ViT from scratch. Each image gets noise of a random level, so one model works at all levels.

Examples:
    accelerate launch scripts/pretrain.py --dataset_name uoft-cs/cifar10 --output_dir my-model
    accelerate launch scripts/pretrain.py --dataset_name uoft-cs/cifar10 --output_dir my-model \\
        --resume_from_checkpoint latest

Run the second command if the first was interrupted: the model gets the weights that it would get without the interruption.
On CPUs, start several processes with `torchrun --nproc_per_node 2 scripts/pretrain.py ...`, because
`accelerate launch --cpu` starts only one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification
from hf_smoothing.data.labelled_images import LabelledImages
from hf_smoothing.hub.model_cards import create_card
from hf_smoothing.hub.push import HubSettings
from hf_smoothing.training.classifier_training import train_classifier
from hf_smoothing.training.evaluation import EvaluationSettings
from hf_smoothing.training.training_images import ImageSettings, find_class_names
from hf_smoothing.training.training_log import describe_training
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error


@dataclass
class ModelSettings:
    """The architecture; see MixedNoiseViTConfig."""

    image_size: int = HfArg(default=32, help="height and width in pixels that images are resized to")
    patch_size: int = HfArg(default=4, help="height and width of a patch (token) in pixels")
    hidden_size: int = HfArg(default=128, help="width of the transformer")
    num_hidden_layers: int = HfArg(default=4, help="number of transformer blocks")
    num_attention_heads: int = HfArg(default=4, help="number of attention heads")
    mlp_ratio: float = HfArg(default=4.0, help="width of a block's MLP as a multiple of hidden_size")
    stem: str = HfArg(
        default="conv", help="first layers: pool or conv (small convolutional networks) or patch (one linear layer)"
    )
    stem_widths: list[int] | None = HfArg(
        default=None,
        help="channels of the stem pool: of its first convolution, then of each group (default: they double)",
    )
    pooling: str = HfArg(default="avg", help="from tokens to one vector: avg, max or token (a class token)")
    layer_scale_init: float | None = HfArg(
        default=None,
        help="initial value of a learned scale on each residual branch, such as 0.001 (default: no scale)",
    )
    norm_layer: str = HfArg(default="layernorm", help="layernorm, groupnorm or rmsnorm; batchnorm for ablations")
    drop_path_rate: float = HfArg(default=0.0, help="rate of stochastic depth")


def compute_normalization(images: LabelledImages, max_samples: int = 1000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, over at most `max_samples` images."""
    step = 1 if images.total is None else max(1, images.total // max_samples)
    moments: list[tuple[torch.Tensor, torch.Tensor]] = []
    for position, (_, read) in enumerate(images.rows()):
        if len(moments) == max_samples:
            break
        if position % step == 0:
            picture = images.picture(read())
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(-1, 3).float() / 255
            moments.append((pixels.mean(0), pixels.square().mean(0)))
    mean, mean_square = (torch.stack(values).mean(0) for values in zip(*moments))
    return mean.tolist(), (mean_square - mean.square()).sqrt().tolist()


def main() -> None:
    parser = argument_parser(
        (ModelSettings, ImageSettings, TrainingSettings, EvaluationSettings, HubSettings), __doc__
    )
    parser.set_defaults(sigmas=[0.0, 0.25, 0.5, 1.0])
    with exit_on_error():
        model_settings, image_settings, settings, evaluation, hub = parser.parse_args_into_dataclasses()
        accelerator = settings.create_accelerator()
        hub.prepare(settings.output_dir, accelerator)
        with accelerator.main_process_first():  # the main process downloads the dataset, the others read its cache
            images = image_settings.open()
        class_names = find_class_names(images)
        mean, std = compute_normalization(images)
        torch.manual_seed(settings.seed)
        config = MixedNoiseViTConfig(
            **vars(model_settings),
            image_mean=mean,
            image_std=std,
            id2label=dict(enumerate(class_names)),
            label2id={name: index for index, name in enumerate(class_names)},
        )
        model = MixedNoiseViTForImageClassification(config)
        results = train_classifier(model, images, image_settings, settings, evaluation, accelerator)
        if accelerator.is_main_process:
            create_card(
                Path(settings.output_dir),
                dataset=image_settings.dataset_name,
                finetune_first=True,
            )
        accelerator.print(describe_training(results, settings.output_dir))
        hub.publish(settings.output_dir, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
