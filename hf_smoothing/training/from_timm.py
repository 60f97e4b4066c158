"""Mixed-noise ViTs from timm's vision transformers."""

from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from ..core.modeling_mixed_noise_vit import MixedNoiseViTForImageClassification


def from_timm(name: str, *, pretrained: bool = True, **config_kwargs: Any) -> MixedNoiseViTForImageClassification:
    """
    Build a mixed-noise ViT with the architecture and the weights of a timm ViT.

    Args:
        name: a timm model whose class is timm's `VisionTransformer`, such as `"vit_tiny_patch16_224"`.
        pretrained: load timm's weights; otherwise they are random.
        config_kwargs: fields of [`MixedNoiseViTConfig`] to set as well, such as `num_labels` or `id2label`.

    Returns:
        A model with a new classifier. On clean images its features equal timm's.

    Raises:
        ValueError: for an unknown name, weights that cannot be loaded (no network and none in the cache), or a model that a
            mixed-noise ViT cannot represent.
    """
    if not timm.is_model(name):
        close = ", ".join(get_close_matches(name, timm.list_models(module="vision_transformer"), 4, 0.3))
        raise ValueError(f"timm has no model {name!r}. Close: {close}.")
    try:
        source = timm.create_model(name, pretrained=pretrained, num_classes=0).eval()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"The weights of timm's {name!r} cannot be loaded: {reason}") from error
    timm_config = _read_config(name, source)
    for field in ("image_mean", "image_std"):
        timm_config[field] = config_kwargs.pop(field, timm_config[field])
    for field in timm_config.keys() & config_kwargs.keys():
        if config_kwargs[field] != timm_config[field]:
            raise ValueError(
                f"{field}={config_kwargs[field]!r} differs from that of timm's {name!r} ({timm_config[field]!r}): leave it "
                "out, or choose another model."
            )
    config = MixedNoiseViTConfig(**{**timm_config, **config_kwargs})
    model = MixedNoiseViTForImageClassification(config)
    state = source.state_dict()
    if "fc_norm.weight" in state:  # these normalize after average pooling, ours before
        raise ValueError(_unsupported(name, "it normalizes after pooling"))
    try:
        model.mixed_noise_vit.encoder.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(_unsupported(name, str(error).splitlines()[-1].strip())) from error
    _check_same_features(name, model.mixed_noise_vit.encoder, source)
    return model


def _unsupported(name: str, reason: str) -> str:
    return f"timm's {name!r} is not a ViT that MixedNoiseViT can represent: {reason}."


def _read_config(name: str, source: Any) -> dict[str, Any]:
    """The architecture of a timm ViT, as fields of our config."""
    if type(source) is not VisionTransformer or not isinstance(source.patch_embed, PatchEmbed):
        raise ValueError(_unsupported(name, f"it is a {type(source).__name__}"))
    if source.global_pool not in ("avg", "token"):
        raise ValueError(_unsupported(name, f"it pools with {source.global_pool!r}"))
    block = source.blocks[0]
    return {
        "image_size": source.patch_embed.img_size[0],
        "patch_size": source.patch_embed.patch_size[0],
        "num_channels": source.in_chans,
        "hidden_size": source.embed_dim,
        "num_hidden_layers": len(source.blocks),
        "num_attention_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / source.embed_dim,
        "stem": "patch",
        "pooling": source.global_pool,
        "class_token": source.has_class_token,
        "num_register_tokens": source.num_reg_tokens,
        "position_embed_prefix_tokens": not source.no_embed_class,
        "pre_norm": not isinstance(source.norm_pre, nn.Identity),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "layer_scale_init": 1e-5 if hasattr(getattr(block, "ls1", None), "gamma") else None,
        "norm_eps": block.norm1.eps,
        "image_mean": source.pretrained_cfg["mean"],
        "image_std": source.pretrained_cfg["std"],
    }


@torch.no_grad()
def _check_same_features(name: str, encoder: VisionTransformer, source: Any) -> None:
    """Compare features: with equal weights they may still differ, for example by another activation function."""
    training = encoder.training
    encoder.eval()
    size = source.patch_embed.img_size
    pixel_values = torch.linspace(-1, 1, source.in_chans * size[0] * size[1]).view(1, source.in_chans, *size)
    if not torch.allclose(encoder(pixel_values), source(pixel_values), atol=1e-4):
        raise ValueError(_unsupported(name, "with the same weights its features differ"))
    encoder.train(training)
