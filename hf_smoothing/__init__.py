"""Certified robustness for Hugging Face image classifiers, by randomized smoothing.

Importing the package registers the mixed-noise ViT with transformers' Auto classes, and the pipeline task
`certified-image-classification`.
"""

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.bounds import clopper_pearson_lower
    from .core.certificates import ABSTAIN, Certificate, format_radius
    from .core.configuration_mixed_noise_vit import MixedNoiseViTConfig
    from .core.count_rule import CountRule
    from .core.diffusion_denoiser import DiffusionDenoiser
    from .core.fixed_rule import FixedRule
    from .core.modeling_count_prediction import MixedNoiseViTForCountPrediction
    from .core.modeling_mixed_noise_vit import (
        MixedNoiseViTForImageClassification,
        MixedNoiseViTModel,
        MixedNoiseViTPreTrainedModel,
    )
    from .core.noise import GaussianNoise, LaplaceNoise, UniformNoise
    from .core.pipeline_certified_image_classification import CertifiedImageClassificationPipeline
    from .core.sequential_rule import SequentialRule
    from .core.smoothing import SmoothedClassifier
    from .core.two_stage_rule import TwoStageRule
    from .data.demo_images import load_demo_images
    from .diagnostics.model_check import check_model
    from .metrics.certified_accuracy import CertifiedAccuracy
    from .training.from_timm import from_timm
    from .training.noise_mixture import NoiseMixture

_NAMES = {
    "core.bounds": ("clopper_pearson_lower",),
    "core.certificates": ("ABSTAIN", "Certificate", "format_radius"),
    "core.configuration_mixed_noise_vit": ("MixedNoiseViTConfig",),
    "core.count_rule": ("CountRule",),
    "core.diffusion_denoiser": ("DiffusionDenoiser",),
    "core.fixed_rule": ("FixedRule",),
    "core.modeling_count_prediction": ("MixedNoiseViTForCountPrediction",),
    "core.modeling_mixed_noise_vit": (
        "MixedNoiseViTForImageClassification",
        "MixedNoiseViTModel",
        "MixedNoiseViTPreTrainedModel",
    ),
    "core.noise": ("GaussianNoise", "LaplaceNoise", "UniformNoise"),
    "core.pipeline_certified_image_classification": ("CertifiedImageClassificationPipeline",),
    "core.sequential_rule": ("SequentialRule",),
    "core.two_stage_rule": ("TwoStageRule",),
    "core.smoothing": ("SmoothedClassifier",),
    "data.demo_images": ("load_demo_images",),
    "diagnostics.model_check": ("check_model",),
    "metrics.certified_accuracy": ("CertifiedAccuracy",),
    "training.from_timm": ("from_timm",),
    "training.noise_mixture": ("NoiseMixture",),
}
"""The public names by module, imported when they are first used."""

_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@cache
def register() -> None:
    """Register the model classes with transformers' Auto classes, and the pipeline task; once per process."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
    from transformers.pipelines import PIPELINE_REGISTRY

    from .core.configuration_mixed_noise_vit import MixedNoiseViTConfig
    from .core.modeling_mixed_noise_vit import MixedNoiseViTForImageClassification, MixedNoiseViTModel
    from .core.pipeline_certified_image_classification import CertifiedImageClassificationPipeline

    AutoConfig.register(MixedNoiseViTConfig.model_type, MixedNoiseViTConfig)
    AutoModel.register(MixedNoiseViTConfig, MixedNoiseViTModel)
    AutoModelForImageClassification.register(MixedNoiseViTConfig, MixedNoiseViTForImageClassification)
    PIPELINE_REGISTRY.register_pipeline(
        "certified-image-classification",
        pipeline_class=CertifiedImageClassificationPipeline,
        pt_model=AutoModelForImageClassification,
        type="image",
    )


# The command registers when it loads a model, so that `hf-smoothing --help` does not wait for torch and transformers
if Path(sys.argv[0]).stem != "hf-smoothing":
    register()
