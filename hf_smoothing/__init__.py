"""Certified robustness for Hugging Face image classifiers, by randomized smoothing.

Importing the package registers the mixed-noise ViT with transformers' Auto classes, and the pipeline task
`certified-image-classification`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .core.bounds import clopper_pearson_lower, confidence_sequence_lower, log_e_value
from .core.certificates import ABSTAIN, Certificate, format_radius
from .core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from .core.count_rule import CountRule
from .core.fixed_rule import FixedRule
from .core.modeling_count_prediction import MixedNoiseViTForCountPrediction
from .core.modeling_mixed_noise_vit import (
    MixedNoiseViTForImageClassification,
    MixedNoiseViTModel,
    MixedNoiseViTPreTrainedModel,
)
from .core.noise import GaussianNoise, LaplaceNoise, UniformNoise
from .core.pipeline_certified_image_classification import CertifiedImageClassificationPipeline
from .core.predict_rule import PredictRule
from .core.sequential_rule import SequentialRule
from .core.smoothing import SmoothedClassifier
from .data.demo_images import load_demo_images
from .metrics.certified_accuracy import CertifiedAccuracy
from .training.from_timm import from_timm
from .training.noise_mixture import NoiseMixture

AutoConfig.register(MixedNoiseViTConfig.model_type, MixedNoiseViTConfig)
AutoModel.register(MixedNoiseViTConfig, MixedNoiseViTModel)
AutoModelForImageClassification.register(MixedNoiseViTConfig, MixedNoiseViTForImageClassification)
PIPELINE_REGISTRY.register_pipeline(
    "certified-image-classification",
    pipeline_class=CertifiedImageClassificationPipeline,
    pt_model=AutoModelForImageClassification,
    type="image",
)

__all__ = [
    "ABSTAIN",
    "Certificate",
    "CertifiedAccuracy",
    "CertifiedImageClassificationPipeline",
    "CountRule",
    "FixedRule",
    "GaussianNoise",
    "LaplaceNoise",
    "MixedNoiseViTConfig",
    "MixedNoiseViTForCountPrediction",
    "MixedNoiseViTForImageClassification",
    "MixedNoiseViTModel",
    "MixedNoiseViTPreTrainedModel",
    "NoiseMixture",
    "PredictRule",
    "SequentialRule",
    "SmoothedClassifier",
    "UniformNoise",
    "clopper_pearson_lower",
    "confidence_sequence_lower",
    "format_radius",
    "from_timm",
    "load_demo_images",
    "log_e_value",
]
