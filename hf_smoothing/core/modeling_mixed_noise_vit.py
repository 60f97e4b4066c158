"""The mixed-noise ViT: one classifier for clean and noisy images at every noise level (arXiv 2312.09020).

The encoder is timm's `VisionTransformer`; this file adds what certification needs around it: pixels in `[0, 1]`,
normalisation inside the model, and norms that do not depend on the rest of the batch.
"""

from functools import partial
from itertools import pairwise
from math import gcd
from typing import Any

import torch
from timm.layers import HybridEmbed, LayerNorm, PatchEmbed, RmsNorm, RmsNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .configuration_mixed_noise_vit import MixedNoiseViTConfig


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the channels of tokens `(batch, tokens, channels)` or features `(batch, channels)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.ndim == 2:
            return super().forward(hidden_states)
        return super().forward(hidden_states.transpose(1, 2)).transpose(1, 2)


class ChannelGroupNorm(nn.GroupNorm):
    """Normalisation over groups of 16 channels and all pixels of one image (Wu and He 2018, arXiv 1803.08494)."""

    def __init__(self, num_channels: int, eps: float = 1e-6, **kwargs: Any):
        super().__init__(num_channels // gcd(num_channels, 16), num_channels, eps=eps, **kwargs)


class TokenGroupNorm(ChannelGroupNorm):
    """[`ChannelGroupNorm`] with channels last: over all tokens of `(batch, tokens, channels)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.transpose(1, -1)).transpose(1, -1)


class ResidualBlock(nn.Module):
    """Pre-activation residual block that halves height and width."""

    def __init__(self, in_channels: int, out_channels: int, norm_layer: Any):
        super().__init__()
        self.norm1 = norm_layer(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm2 = norm_layer(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
        self.act = nn.GELU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        activated = self.act(self.norm1(features))
        return self.conv2(self.act(self.norm2(self.conv1(activated)))) + self.shortcut(activated)


class ConvTrunk(nn.Module):
    """
    Convolutional stem: a 3x3 convolution, then residual blocks that halve the image until a token covers `patch_size` pixels
    a side. Widths double up to `hidden_size`.
    """

    def __init__(self, config: MixedNoiseViTConfig):
        super().__init__()
        stages = config.patch_size.bit_length() - 1
        widths = [max(config.hidden_size >> (stages - stage), 16) for stage in range(stages)] + [config.hidden_size]
        norm_layer = _conv_norm(config)
        self.num_features = config.hidden_size
        self.conv = nn.Conv2d(config.num_channels, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(narrow, wide, norm_layer) for narrow, wide in pairwise(widths)))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.conv(pixel_values.contiguous(memory_format=torch.channels_last)))


def _conv_norm(config: MixedNoiseViTConfig) -> Any:
    if config.norm_layer == "batchnorm":
        return nn.BatchNorm2d
    norms: dict[str, Any] = {
        # one group: statistics over one image's channels and pixels, never over the batch
        "layernorm": partial(nn.GroupNorm, 1),
        "groupnorm": ChannelGroupNorm,
        "rmsnorm": RmsNorm2d,
    }
    return partial(norms[config.norm_layer], eps=config.norm_eps)


class IdentityConv2d(nn.Conv2d):
    """A convolution that starts by passing its input on: its first channels are the input's, the others random."""


class PoolTrunk(nn.Module):
    """
    Convolutional stem that halves the image by max-pooling: a 2x2 convolution, then groups of two 3x3 convolutions with a
    max-pooling in between, until a token covers `patch_size` pixels a side.

    The first convolution has no padding: 32 pixels a side become 31, so tokens of 8 pixels make a grid of 3x3.

    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498).
    """

    def __init__(self, config: MixedNoiseViTConfig):
        super().__init__()
        stages = config.patch_size.bit_length() - 1
        widths = config.stem_widths or [max(config.hidden_size >> (stages - stage), 16) for stage in range(stages + 1)]
        norm_layer = _conv_norm(config)
        self.num_features = widths[-1]
        self.conv = nn.Conv2d(config.num_channels, widths[0], 2)
        self.act = nn.GELU()
        self.groups = nn.Sequential(
            *(
                nn.Sequential(
                    IdentityConv2d(narrow, wide, 3, padding=1, bias=False),
                    nn.MaxPool2d(2),
                    norm_layer(wide),
                    nn.GELU(),
                    IdentityConv2d(wide, wide, 3, padding=1, bias=False),
                    norm_layer(wide),
                    nn.GELU(),
                )
                for narrow, wide in pairwise(widths)
            )
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.groups(self.act(self.conv(pixel_values.contiguous(memory_format=torch.channels_last))))


def _embed_layer(config: MixedNoiseViTConfig) -> Any:
    if config.stem == "patch":
        return PatchEmbed
    pooled = config.stem == "pool"
    grid = (config.image_size - pooled) // config.patch_size

    def conv_embed(img_size: int, patch_size: int, **kwargs: Any) -> HybridEmbed:
        trunk = PoolTrunk(config) if pooled else ConvTrunk(config)
        # a pooling trunk of the transformer's width needs no projection
        proj = not pooled or trunk.num_features != config.hidden_size
        # timm expects patches of pixels; here each position of the trunk's output is one token
        return HybridEmbed(trunk, img_size, 1, feature_size=grid, feature_ratio=patch_size, proj=proj, **kwargs)

    return conv_embed


_TOKEN_NORMS = {
    "layernorm": LayerNorm,
    "groupnorm": TokenGroupNorm,
    "rmsnorm": RmsNorm,
    "batchnorm": TokenBatchNorm,
}


def _build_encoder(config: MixedNoiseViTConfig) -> VisionTransformer:
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        num_classes=0,
        global_pool=config.pooling,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        init_values=config.layer_scale_init,
        class_token=bool(config.class_token),
        no_embed_class=not config.position_embed_prefix_tokens,
        reg_tokens=config.num_register_tokens,
        pre_norm=config.pre_norm,
        # Normalising before pooling works for both poolings and keeps `last_hidden_state` normalised.
        fc_norm=False,
        drop_rate=config.dropout,
        drop_path_rate=config.drop_path_rate,
        weight_init="skip",  # `_init_weights` below: transformers decides which weights to initialise
        embed_layer=_embed_layer(config),
        norm_layer=partial(_TOKEN_NORMS[config.norm_layer], eps=config.norm_eps),
    )


class MixedNoiseViTPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading shared by the models of this file."""

    config: MixedNoiseViTConfig
    config_class = MixedNoiseViTConfig
    base_model_prefix = "mixed_noise_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "ConvTrunk", "PoolTrunk"]  # noqa: RUF012 (transformers reads and replaces it)
    _supports_sdpa = True  # timm's attention calls scaled_dot_product_attention itself

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, IdentityConv2d):
            weight = torch.empty_like(module.weight)
            nn.init.kaiming_uniform_(weight, a=5**0.5)
            nn.init.dirac_(weight[: module.in_channels])
            init.copy_(module.weight, weight)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, (RmsNorm, RmsNorm2d)):
            init.ones_(module.weight)
        elif isinstance(module, VisionTransformer):
            for name, parameter in module.named_parameters():
                if name in ("cls_token", "reg_token", "pos_embed"):
                    init.trunc_normal_(parameter, std=std)
                elif name.endswith(".gamma"):  # layer scale
                    init.constant_(parameter, self.config.layer_scale_init)
        elif hasattr(module, "image_mean"):
            # The config holds these buffers, not the checkpoint, so they are set here. No `isinstance` check: as remote
            # code this file may run twice, and its classes then differ.
            shape = (1, -1, 1, 1)
            init.copy_(module.image_mean, torch.tensor(self.config.image_mean).view(shape))
            init.copy_(module.image_std, torch.tensor(self.config.image_std).view(shape))

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        # timm checkpoints all of its blocks, non-reentrant, as transformers does by default
        if options.get("every_n_layers", 1) != 1:
            raise ValueError("every_n_layers must be 1: timm checkpoints every block or none.")
        for module in self.modules():
            if isinstance(module, VisionTransformer):
                module.set_grad_checkpointing(enable)


class MixedNoiseViTModel(MixedNoiseViTPreTrainedModel):
    """The encoder without a head. Noise may leave `[0, 1]`: it is never clipped, since certificates are for all of it."""

    def __init__(self, config: MixedNoiseViTConfig):
        super().__init__(config)
        self.encoder = _build_encoder(config)
        shape = (1, config.num_channels, 1, 1)
        self.register_buffer("image_mean", torch.empty(shape), persistent=False)
        self.register_buffer("image_std", torch.empty(shape), persistent=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patch_embed

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: `(batch, channels, height, width)`, in `[0, 1]` before noise.
            output_hidden_states: whether to return `hidden_states` too.
            return_dict: `False` for a plain tuple.

        Returns:
            `last_hidden_state` of shape `(batch, tokens, hidden_size)`, `pooler_output` `(batch, hidden_size)` and
            `hidden_states`, the output of each block: patch tokens only, before the last norm.

        Raises:
            ValueError: if the pixels do not have the shape of the config.
        """
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; this model takes (batch, *{expected}). "
                "Resize with its image processor."
            )
        pixel_values = (pixel_values.to(self.image_mean.dtype) - self.image_mean) / self.image_std
        blocks = None
        if output_hidden_states:
            last, blocks = self.encoder.forward_intermediates(pixel_values, output_fmt="NLC")
        else:
            last = self.encoder.forward_features(pixel_values)
        pooled = self.encoder.forward_head(last)
        output = BaseModelOutputWithPooling(last, pooled, None if blocks is None else tuple(blocks))
        return output if return_dict is not False else output.to_tuple()


class MixedNoiseViTForImageClassification(MixedNoiseViTPreTrainedModel):
    """
    The encoder with a linear classifier on the pooled features.

    Example:
        >>> import torch
        >>> config = MixedNoiseViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=10)
        >>> model = MixedNoiseViTForImageClassification(config).eval()
        >>> model(torch.rand(2, 3, 32, 32)).logits.shape
        torch.Size([2, 10])
    """

    def __init__(self, config: MixedNoiseViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mixed_noise_vit = MixedNoiseViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **loss_kwargs: Any,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: `(batch, channels, height, width)`, in `[0, 1]` before noise.
            labels: `(batch,)` class indices; with them the output holds the cross-entropy `loss`.
            return_dict: `False` for a plain tuple.
            **loss_kwargs: passed on to the loss, such as `num_items_in_batch`.

        Returns:
            `logits` of shape `(batch, num_labels)`, and `loss` where labels were given.
        """
        logits = self.classifier(self.mixed_noise_vit(pixel_values).pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **loss_kwargs)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()


__all__ = ["MixedNoiseViTForImageClassification", "MixedNoiseViTModel", "MixedNoiseViTPreTrainedModel"]
