"""Registers the mixed-noise ViT with transformers' Auto classes, and the pipeline task."""

from functools import cache

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_mixed_noise_vit import MixedNoiseViTConfig
from .modeling_mixed_noise_vit import MixedNoiseViTForImageClassification, MixedNoiseViTModel
from .pipeline_certified_image_classification import CertifiedImageClassificationPipeline


@cache
def register() -> None:
    """Register the classes and the task `certified-image-classification`, once per process."""
    AutoConfig.register(MixedNoiseViTConfig.model_type, MixedNoiseViTConfig)
    AutoModel.register(MixedNoiseViTConfig, MixedNoiseViTModel)
    AutoModelForImageClassification.register(MixedNoiseViTConfig, MixedNoiseViTForImageClassification)
    PIPELINE_REGISTRY.register_pipeline(
        "certified-image-classification",
        pipeline_class=CertifiedImageClassificationPipeline,
        pt_model=AutoModelForImageClassification,
        type="image",
    )
