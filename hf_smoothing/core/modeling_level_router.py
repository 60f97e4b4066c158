"""The router's network: from a noisy picture at low resolution to a score for each noise level."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from .weights import check_loaded_weights, loading

ROUTER_FOLDER = "router"
"""Where a router lies in the folder of a count head or a model."""


@strict
class LevelRouterConfig(PreTrainedConfig):
    """
    Configuration of a [`LevelRouter`].

    Args:
        levels: the noise levels that it chooses from, ascending, in `[0, 1]` pixels.
        noise_sigma: standard deviation of its own noise, under which it is trained and smoothed.
        grid: pixels per side of the picture that it looks at. Averaging to few pixels removes most of the noise.
        num_channels: channels of the picture.
        hidden_size: width of its two hidden layers.
        initializer_range: standard deviation of the initialisation.

    Raises:
        ValueError: for inconsistent values.
    """

    model_type = "level_router"

    levels: list[float] | tuple[float, ...] = (0.25, 0.5, 1.0)
    noise_sigma: float = 1.0
    grid: int = 8
    num_channels: int = 3
    hidden_size: int = 128
    initializer_range: float = 0.02

    def validate_architecture(self):
        """Part of `@strict` validation: runs at construction and on save."""
        if not self.levels or list(self.levels) != sorted(set(self.levels)) or min(self.levels) <= 0:
            raise ValueError(f"levels={list(self.levels)} must be different noise levels above 0, in ascending order.")
        for name in ("noise_sigma", "grid", "num_channels", "hidden_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")


class LevelRouter(PreTrainedModel):
    """
    Scores the noise levels for a noisy picture. It averages the picture to `grid` x `grid` pixels, which costs far less than
    a pass through the classifier, and leaves little of the noise.
    """

    config: LevelRouterConfig
    config_class = LevelRouterConfig
    base_model_prefix = "router"
    main_input_name = "pixel_values"

    def __init__(self, config: LevelRouterConfig):
        super().__init__(config)
        width, inputs = config.hidden_size, config.num_channels * config.grid**2
        self.pool = nn.AdaptiveAvgPool2d(config.grid)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, len(config.levels)),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Scores `(batch, levels)` of pictures with noise, `(batch, channels, height, width)` in `[0, 1]` without it."""
        return self.layers(4 * (self.pool(pixel_values) - 0.5))


def load_router(model_name_or_path: str | Path, **hub_kwargs: Any) -> LevelRouter:
    """
    Load a router: from its own folder or repository, or from the folder `router` in that of a count head or a model.

    Args:
        model_name_or_path: a name on the Hub or a local folder.
        hub_kwargs: such as `revision`.

    Raises:
        ValueError: for a folder without a router, damaged weights.
    """
    name = str(model_name_or_path)
    with loading(name):
        config, _ = PreTrainedConfig.get_config_dict(name, **hub_kwargs)
    if config.get("model_type") != LevelRouterConfig.model_type:
        hub_kwargs = {**hub_kwargs, "subfolder": ROUTER_FOLDER}
        if cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs) is None:
            raise ValueError(f"{name!r} has no router, which sigma='auto' needs: scripts/train_router.py trains one.")
    with loading(name):
        router, info = LevelRouter.from_pretrained(name, output_loading_info=True, dtype=torch.float32, **hub_kwargs)
    check_loaded_weights(name, info, ())
    return router


__all__ = ["LevelRouter", "LevelRouterConfig"]
