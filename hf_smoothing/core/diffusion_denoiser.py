"""A diffusion model in front of a classifier: certificates for models that were trained on clean images only."""

import math
from bisect import bisect_left
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .weights import check_loaded_weights, loading


class DiffusionDenoiser(nn.Module):
    """
    Denoises with one step of a diffusion model of the `diffusers` library; nothing is trained.

    Diffusion models see pixels in `[-1, 1]`, so that noise of `sigma` in `[0, 1]` pixels is noise of `2 * sigma` there. At
    its timesteps, the model was trained on `sqrt(a) * image + sqrt(1 - a) * noise`, where `a` falls from 1 to 0. Scaled by
    `sqrt(a)` with `a = 1 / (1 + (2 * sigma)**2)`, noisy pixels have this form. The model predicts the noise (or the image,
    or the velocity), which gives an estimate of the image. The scaling is exact for every sigma; the timestep that the
    model is told is the nearest of the schedule (on a logarithmic scale of noise levels), because models are trained on
    whole timesteps.

    Args:
        model: predicts from `(sample, timestep)`, as diffusers' `UNet2DModel`. If it returns twice as many channels as it
            takes, the second half is a learned variance, which is not used.
        scheduler: of diffusers, with the model's `alphas_cumprod` and, in its config, `prediction_type`, `clip_sample` and
            `clip_sample_range`.

    Attributes:
        levels: the noise level of each timestep, ascending, in units of `[0, 1]` pixels.

    Raises:
        ValueError: for an unknown prediction type.

    Source: Carlini et al. 2022, "(Certified!!) Adversarial Robustness for Free!" (arXiv 2206.10550).
    """

    def __init__(self, model: Any, scheduler: Any):
        super().__init__()
        self.model, self.scheduler = model, scheduler
        config = scheduler.config
        self.prediction_type = config.prediction_type
        if self.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"prediction_type={self.prediction_type!r} must be epsilon, sample or v_prediction.")
        self.limit = config.clip_sample_range if config.clip_sample else None
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod)  # part of what certificates name
        self.levels = [math.sqrt(1 / a - 1) / 2 if a > 0 else math.inf for a in scheduler.alphas_cumprod.tolist()]

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, *, revision: str | None = None) -> "DiffusionDenoiser":
        """
        Load an unconditional diffusion model of pixels, such as `google/ddpm-cifar10-32`, from the Hub or a local folder.

        Args:
            model_name_or_path: a `UNet2DModel` with its scheduler: both at the top, or in the folders `unet` and
                `scheduler`, as pipelines of diffusers are saved.
            revision: on the Hub: a branch, tag or commit.

        Raises:
            ImportError: where `diffusers` is not installed.
            ValueError: for a model that cannot be loaded, or of another kind.
        """
        require_diffusers()
        try:  # transformers takes an import outside `try` for one that every published model needs
            from diffusers import DDPMScheduler, UNet2DModel
        except ImportError as error:
            raise ImportError(f"diffusers cannot be imported: {error}") from error
        name, options = str(model_name_or_path), {} if revision is None else {"revision": revision}
        with loading(name):
            config, model_options, scheduler_options = _load_config(UNet2DModel, name, options)
            scheduler_config = DDPMScheduler.load_config(name, **scheduler_options)
            _check_kinds(name, config, scheduler_config, DDPMScheduler._compatibles)
            model, info = UNet2DModel.from_pretrained(
                name, torch_dtype=torch.float32, output_loading_info=True, **model_options
            )
        check_loaded_weights(name, info, ())
        return cls(model, DDPMScheduler.from_config(scheduler_config))

    def find_timestep(self, sigma: float) -> int:
        """
        The timestep whose noise level is nearest to `sigma`, in units of `[0, 1]` pixels.

        Raises:
            ValueError: for a sigma outside the levels of the schedule.
        """
        if not self.levels[0] <= sigma <= self.levels[-1]:
            raise ValueError(
                f"sigma={sigma:g} is outside the noise levels of the diffusion model, from {self.levels[0]:.3g} to "
                f"{self.levels[-1]:.3g}: choose a sigma in between, or another denoiser."
            )
        above = bisect_left(self.levels, sigma)
        if above == 0 or self.levels[above] * self.levels[above - 1] < sigma**2:
            return above
        return above - 1

    def forward(self, pixels: torch.Tensor, sigma: float) -> torch.Tensor:
        """
        Estimate the clean pixels. Each image is denoised on its own, and the same image always in the same way.

        Args:
            pixels: with noise, `(batch, channels, height, width)`, in units of `[0, 1]` pixels.
            sigma: the noise level, in the same units.

        Returns:
            Pixels of the same shape; in `[0, 1]` if the scheduler clips to `[-1, 1]`.

        Raises:
            ValueError: for pixels of a size that the model was not trained on, or a sigma outside its schedule.
        """
        self._check_shape(pixels)
        timesteps = torch.full((len(pixels),), self.find_timestep(sigma), device=pixels.device)
        a = 1 / (1 + (2 * sigma) ** 2)
        sample = math.sqrt(a) * (2 * pixels - 1)
        predicted = self.model(sample, timesteps).sample[:, : pixels.shape[1]].to(pixels.dtype)
        if self.prediction_type == "epsilon":
            estimate = (sample - math.sqrt(1 - a) * predicted) / math.sqrt(a)
        elif self.prediction_type == "v_prediction":
            estimate = math.sqrt(a) * sample - math.sqrt(1 - a) * predicted
        else:
            estimate = predicted
        if self.limit is not None:
            estimate = estimate.clamp(-self.limit, self.limit)
        return (estimate + 1) / 2

    def _check_shape(self, pixels: torch.Tensor) -> None:
        config = self.model.config
        size = config.sample_size
        height, width = (size, size) if size is None or isinstance(size, int) else size
        shape = (config.in_channels, height or pixels.shape[2], width or pixels.shape[3])
        if tuple(pixels.shape[1:]) != shape:
            channels, *sides = shape
            raise ValueError(
                f"The diffusion model denoises pictures of {channels} channels and {sides[0]}x{sides[1]} pixels, not "
                f"{pixels.shape[1]} channels and {pixels.shape[2]}x{pixels.shape[3]}: set noise_resolution={sides[0]}, or "
                "choose another model."
            )


def require_diffusers() -> None:
    """Raise an `ImportError` that says how to install `diffusers`, where it is missing."""
    if find_spec("diffusers") is None:
        raise ImportError("A diffusion model as denoiser needs diffusers: pip install 'hf-smoothing[diffusers]'.")


def _load_config(model_class: Any, name: str, options: dict[str, str]) -> tuple[dict[str, Any], ...]:
    """A model's config, and the options that load the model and its scheduler: both lie at the top, or in folders."""
    try:
        return model_class.load_config(name, **options), options, options
    except OSError as error:
        unet, scheduler = ({**options, "subfolder": folder} for folder in ("unet", "scheduler"))
        try:
            return model_class.load_config(name, **unet), unet, scheduler
        except OSError:
            raise error from None


def _check_kinds(name: str, config: Any, scheduler_config: Any, schedulers: list[str]) -> None:
    """Raise a `ValueError` for a model or a schedule that does not mean what a `DiffusionDenoiser` computes."""
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel" or config.get("num_class_embeds") or config.get("class_embed_type"):
        condition = "" if kind != "UNet2DModel" else " for given classes"
        raise ValueError(f"{name!r} is a {kind}{condition}: a denoiser is an unconditional UNet2DModel of pixels.")
    scheduler = scheduler_config.get("_class_name", "DDPMScheduler")
    if scheduler not in ("DDPMScheduler", *schedulers):
        raise ValueError(
            f"{name!r} has a {scheduler}, whose noise is scaled in another way than a DDPMScheduler's: choose a model "
            "that was trained with a DDPMScheduler."
        )
