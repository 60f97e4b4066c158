"""Loading a pretrained classifier for finetuning, with a head for the classes of a dataset."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from ..core.modeling_mixed_noise_vit import MixedNoiseViTForImageClassification
from ..core.weights import check_loaded_weights, check_weights, loading, read_config
from .from_timm import from_timm


def load_for_finetuning(
    model_name_or_path: str, class_names: Sequence[str], *, revision: str | None = None, **config_kwargs: Any
) -> tuple[Any, Any]:
    """
    Load a pretrained model, with a head for the classes of a dataset.

    The head keeps its weights if the model has the same classes in the same order; otherwise it is reinitialized.

    Args:
        model_name_or_path: an image classifier on the Hub or in a local folder, or the name of a timm ViT (with or without
            `timm/` in front), which becomes a mixed-noise ViT.
        class_names: the dataset's classes.
        revision: of the model on the Hub.
        config_kwargs: fields of the config to set, such as `drop_path_rate`.

    Returns:
        The model, and its image processor.

    Raises:
        ValueError: for a model of another kind, a model that cannot be loaded, or a field that the model's config lacks.
    """
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }
    timm_name = model_name_or_path.removeprefix("timm/")
    if not Path(model_name_or_path).exists() and timm.is_model(timm_name):
        timm_model = from_timm(timm_name, **labels, **config_kwargs)
        return timm_model, create_image_processor(timm_model.config.image_size)
    hub_kwargs: dict[str, Any] = {} if revision is None else {"revision": revision}
    with loading(model_name_or_path):
        config = read_config(model_name_or_path, **hub_kwargs)
    same_classes = [config.id2label[index] for index in range(config.num_labels)] == list(class_names)
    model_class: Any = MixedNoiseViTForImageClassification
    if not isinstance(config, MixedNoiseViTConfig):
        model_class = AutoModelForImageClassification
        config_kwargs = {name: value for name, value in config_kwargs.items() if value}
        if unknown := [name for name in config_kwargs if not hasattr(config, name)]:
            raise ValueError(f"A {config.model_type} model has no {', '.join(unknown)}: leave it out.")
    if hasattr(config, "label_names"):  # timm's wrapper saves these instead
        labels["label_names"] = list(class_names)
    # set one by one: not every config takes classes from `from_pretrained`
    for field, value in {**labels, **config_kwargs}.items():
        setattr(config, field, value)
    with loading(model_name_or_path):
        model, loading_info = model_class.from_pretrained(
            model_name_or_path,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            config=config,
            **hub_kwargs,
        )
        if model_class is MixedNoiseViTForImageClassification:
            processor = create_image_processor(config.image_size)
        else:
            processor = AutoImageProcessor.from_pretrained(model_name_or_path, **hub_kwargs)
    _warn_of_batch_norm(model, model_name_or_path)
    head = find_head(model)
    head_names = tuple(name for name, module in model.named_modules() if module is head)
    check_loaded_weights(model_name_or_path, loading_info, (*head_names, "count_head"))
    check_weights(model)
    if not same_classes:
        nn.init.trunc_normal_(head.weight, std=0.02)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return model, processor


def create_image_processor(size: int) -> ViTImageProcessor:
    """The image processor of a mixed-noise ViT. The model itself normalizes, after the noise."""
    return ViTImageProcessor(size={"height": size, "width": size}, do_normalize=False, do_convert_rgb=True)


def find_head(model: Any) -> nn.Linear:
    """
    The linear layer that computes the logits from the features.

    Raises:
        ValueError: if the model does not end with a linear layer.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers or layers[-1].out_features != model.config.num_labels:
        raise ValueError(f"A {model.config.model_type} model does not end with a linear layer: its head is unknown.")
    return layers[-1]


@torch.no_grad()
def average_with_base(model: Any, base_weights: Mapping[str, torch.Tensor], base_share: float) -> Any:
    """
    A copy of a finetuned model whose weights are averaged with those before finetuning, except for the head.

    It keeps more of the robustness of the base, and less of the accuracy on clean images. Running statistics are averaged
    too.

    Args:
        model: the finetuned model.
        base_weights: the state dict of the model before finetuning; that of its head is left out.
        base_share: share of the base in the average, from 0 to 1.

    Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903).
    """
    averaged = copy.deepcopy(model)
    head = {id(parameter) for parameter in find_head(averaged).parameters()}
    for name, weights in averaged.state_dict(keep_vars=True).items():
        if weights.is_floating_point() and id(weights) not in head:
            weights.lerp_(base_weights[name].to(weights.device, weights.dtype), base_share)
    return averaged


def _warn_of_batch_norm(model: nn.Module, name: str) -> None:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        warnings.warn(
            f"{name!r} normalizes by batch statistics (BatchNorm): robustness learned at one noise level does not carry "
            "over to others (arXiv 2312.09020).",
            stacklevel=3,
        )
