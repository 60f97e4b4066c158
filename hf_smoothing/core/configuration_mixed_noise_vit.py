"""Configuration of the mixed-noise ViT."""

import warnings

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

STEMS = ("patch", "conv", "pool")
NORM_LAYERS = ("layernorm", "groupnorm", "rmsnorm", "batchnorm")
POOLINGS = ("avg", "max", "token")


@strict
class MixedNoiseViTConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MixedNoiseViTModel`]: a ViT pretrained on a mixture of clean and noisy images, so that
    one model serves every noise level (arXiv 2312.09020).

    Args:
        image_size: height and width of the input, in pixels. A multiple of `patch_size`.
        patch_size: pixels of the input per token and side. With `stem="conv"` and `stem="pool"` a power of two.
        num_channels: channels of the input.
        hidden_size: width of the transformer. A multiple of `num_attention_heads`.
        num_hidden_layers: number of transformer blocks.
        num_attention_heads: attention heads of each block.
        mlp_ratio: width of a block's MLP as a multiple of `hidden_size`.
        stem: how pixels become tokens: `"patch"` is one linear map per patch, `"conv"` a small residual convolutional trunk
            with batch-independent norms, `"pool"` one that halves by max-pooling and whose convolutions start as identities
            (Jordan 2024, arXiv 2404.00498). The trunks learn far faster in short training, the pooling one fastest.
        stem_widths: channels of the pooling trunk: of its first convolution, then of each group of convolutions. By default
            they double up to `hidden_size`.
        norm_layer: `"layernorm"` normalises each token, and in a trunk all pixels and channels of an image together;
            `"groupnorm"` groups of 16 channels over all tokens or pixels of an image; `"rmsnorm"` divides each token, or the
            channels of each pixel, by their root mean square. All of these treat each image alone. `"batchnorm"` is for
            ablations: robustness does not transfer through batch statistics.
        pooling: `"avg"` averages the patch tokens, `"max"` takes their maximum per channel, `"token"` reads a class token.
        class_token: whether there is a class token; by default where `pooling == "token"`.
        num_register_tokens: extra learned tokens.
        position_embed_prefix_tokens: whether class and register tokens have position embeddings of their own.
        pre_norm: whether tokens are normalised before the first block.
        qkv_bias: whether the attention projections have a bias.
        qk_norm: whether queries and keys are normalised.
        layer_scale_init: initial value of a learned scale on each residual branch; none by default. With a small one the
            blocks start near the identity.
        norm_eps: epsilon of the normalisation layers.
        dropout: dropout in front of the classifier.
        drop_path_rate: stochastic depth of the last block (linear from 0 at the first).
        initializer_range: standard deviation of the truncated normal initialisation.
        image_mean, image_std: one value per channel, 0.5 by default. `pixel_values` are in `[0, 1]`, noise included; the
            model itself normalises them. Noise levels and radii therefore always refer to `[0, 1]` pixels.
        count_sigmas: noise levels that a count head ([`MixedNoiseViTForCountPrediction`]) was trained for, in `[0, 1]`
            pixels. It predicts for every level from the smallest to the largest of them.

    Raises:
        ValueError: for inconsistent values; the message names the value and the fix.
    """

    model_type = "mixed_noise_vit"

    image_size: int = 32
    patch_size: int = 4
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    mlp_ratio: float = 4.0
    stem: str = "conv"
    stem_widths: list[int] | tuple[int, ...] | None = None
    norm_layer: str = "layernorm"
    pooling: str = "avg"
    class_token: bool | None = None
    num_register_tokens: int = 0
    position_embed_prefix_tokens: bool = True
    pre_norm: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale_init: float | None = None
    norm_eps: float = 1e-6
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    count_sigmas: list[float] | tuple[float, ...] | None = None

    def __post_init__(self, **kwargs):
        if not __name__.startswith("transformers_modules."):
            # An entry for users without this package. With it, transformers would refuse to load the pipeline without
            # `trust_remote_code`, although the task is registered here.
            kwargs.pop("custom_pipelines", None)
        if self.class_token is None:
            self.class_token = self.pooling == "token"
        self.image_mean = [0.5] * self.num_channels if self.image_mean is None else list(self.image_mean)
        self.image_std = [0.5] * self.num_channels if self.image_std is None else list(self.image_std)
        if self.norm_layer == "batchnorm":
            warnings.warn(
                'norm_layer="batchnorm" is for ablations: its running statistics belong to one mixture of noise levels, so '
                'robustness does not transfer to a downstream task (arXiv 2312.09020). Use norm_layer="layernorm".',
                stacklevel=2,
            )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: runs at construction and on save."""
        for name, allowed in (("stem", STEMS), ("norm_layer", NORM_LAYERS), ("pooling", POOLINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {allowed}.")
        for name, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, name) % getattr(self, part):
                raise ValueError(f"{name}={getattr(self, name)} is not a multiple of {part}={getattr(self, part)}.")
        if self.stem in ("conv", "pool") and self.patch_size & (self.patch_size - 1):
            raise ValueError(
                f'stem="{self.stem}" halves the image at every stage: patch_size={self.patch_size} must be a power of two.'
            )
        if self.stem_widths is not None:
            stages = self.patch_size.bit_length() - 1
            if self.stem != "pool":
                raise ValueError(f'stem_widths={self.stem_widths} are for stem="pool", not {self.stem!r}.')
            if len(self.stem_widths) != stages + 1 or min(self.stem_widths) < 1:
                raise ValueError(
                    f"stem_widths={self.stem_widths} must be {stages + 1} numbers of channels for patch_size="
                    f"{self.patch_size}: of the first convolution, and of each of {stages} groups."
                )
        if self.stem == "pool" and self.image_size <= self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} leaves the pooling trunk no token of patch_size={self.patch_size} pixels: "
                "choose a smaller patch_size."
            )
        if self.pooling == "token" and not self.class_token:
            raise ValueError('pooling="token" reads the class token: set class_token=True or pooling="avg".')
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.num_channels:
                raise ValueError(f"{name} has {len(getattr(self, name))} values for num_channels={self.num_channels}.")
        if any(std <= 0 for std in self.image_std or ()):
            raise ValueError(f"image_std={self.image_std} must be positive.")
        if self.count_sigmas is not None and (not self.count_sigmas or min(self.count_sigmas) <= 0):
            raise ValueError(f"count_sigmas={self.count_sigmas} must be one or more noise levels above 0.")


__all__ = ["MixedNoiseViTConfig"]
