"""Training a router on what a count head predicts: which noise level certifies each image."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoImageProcessor
from transformers.hf_argparser import HfArg

from ..core.bounds import clopper_pearson_lower
from ..core.count_predictor import CountPredictor
from ..core.modeling_level_router import LevelRouter, LevelRouterConfig
from ..core.noise import GaussianNoise
from ..core.preprocessing import Preprocessing
from ..core.routing import ROUTER_SHARE, VoteRule, combine_radii, exclusion_radii
from ..core.validation import check_count
from ..data.labelled_images import LabelledImages
from ..training.training_loop import TrainingLoop, TrainingSettings
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .count_batches import CountBatches

RADII = tuple(0.25 * step for step in range(7))
"""Where certified accuracy is counted: their mean is what a router is trained for."""

_SOFTNESS = 0.1
"""How far around a radius an image counts as certified in part, so that the loss has a gradient."""
_LEAST_SHARE = 1e-3
_DRAWS, _ALPHA = 1000, 0.001
"""Draws and alpha that turn frequencies into radii."""


@dataclass
class RouterSettings:
    """
    What a router is trained on, and its shape.

    Raises:
        ValueError: for a setting out of range.
    """

    count_head: str = HfArg(help="count head, on the Hub or in a local folder, whose predictions are the targets")
    dataset_name: str = HfArg(help="dataset with labels: a name on the Hub, a local folder, or a Parquet file")
    split: str = HfArg(default="train", help="its split")
    max_train_samples: int | None = HfArg(default=None, help="train on no more images than this")
    levels: list[float] = HfArg(default_factory=lambda: [0.25, 0.5, 1.0], help="noise levels to choose from")
    noise_sigma: float = HfArg(default=1.0, help="the router's own noise; its radii grow with it")
    grid: int = HfArg(default=8, help="pixels per side of the averaged picture that the router looks at")
    hidden_size: int = HfArg(default=128, help="width of its hidden layers")
    copies: int = HfArg(default=8, help="noisy copies per image and step, which estimate the shares of the votes")
    eval_share: float = HfArg(default=0.1, help="share of the images held out")

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        GaussianNoise(self.noise_sigma)
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} must be above 0 and below 1.")


def predict_radii(
    head: CountPredictor, pixels: torch.Tensor, labels: torch.Tensor, levels: list[float]
) -> torch.Tensor:
    """
    The radii `(images, levels)` that draws are expected to prove for the true class; 0 where another class leads.

    Args:
        head: the count head.
        pixels: `(images, channels, height, width)`, uint8.
        labels: `(images,)`, the true classes.
        levels: noise levels.
    """
    # all levels at once: an image passes the encoder only once
    batches = [head(batch.float() / 255, torch.tensor(levels).expand(len(batch), -1)) for batch in pixels.split(256)]
    share, predicted = torch.cat(batches).cpu().max(-1)
    hits = np.rint(_DRAWS * share.double().numpy())
    proved = clopper_pearson_lower(hits, _DRAWS, _ALPHA)
    radii = np.stack([GaussianNoise(sigma).radius(column) for sigma, column in zip(levels, proved.T)], 1)
    return torch.from_numpy(radii).float() * (predicted == labels[:, None])


def soft_certified_share(shares: torch.Tensor, radii: torch.Tensor, noise_sigma: float) -> torch.Tensor:
    """
    The mean over [`RADII`] of a smooth certified accuracy of the system, as `core/routing.py` proves it.

    Args:
        shares: of the votes for each level, `(images, levels)`.
        radii: of the true class at each level, `(images, levels)`.
        noise_sigma: the router's noise.
    """
    at_most = shares.cumsum(1)
    aside = torch.maximum(at_most - shares, 1 - at_most).clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
    radius = torch.maximum(noise_sigma * torch.special.ndtri(aside), radii).min(1).values
    certified = torch.sigmoid((radius[:, None] - torch.tensor(RADII, device=radius.device)) / _SOFTNESS)
    return certified.mean()


def _compute_shares(router: Any, pixels: torch.Tensor, noise_sigma: float, copies: int) -> torch.Tensor:
    noisy = (pixels.float() / 255).repeat_interleave(copies, 0)
    noisy = noisy + noise_sigma * torch.randn_like(noisy)
    return router(noisy).softmax(1).unflatten(0, (len(pixels), copies)).mean(1)


@torch.no_grad()
def evaluate_router(router: LevelRouter, pixels: torch.Tensor, radii: torch.Tensor) -> dict[str, float]:
    """
    Certified accuracy, averaged over [`RADII`], that is expected of each level alone, of the best level at each radius, and
    of the system with counted votes.
    """
    config, alpha = router.config, ROUTER_SHARE * _ALPHA
    votes = []
    for picture in pixels:
        noisy = picture.float() / 255 + config.noise_sigma * torch.randn(VoteRule.n, *picture.shape)
        votes.append(torch.bincount(router(noisy).argmax(1).cpu(), minlength=len(config.levels)).numpy())
    excluded = exclusion_radii(np.array(votes), GaussianNoise(config.noise_sigma), alpha)

    def certified(reached: np.ndarray) -> np.ndarray:
        return np.array([((reached >= radius) & (reached > 0)).mean() for radius in RADII])

    alone = np.array([certified(column) for column in radii.numpy().T])
    figures = {f"alone_{sigma:g}": float(share) for sigma, share in zip(config.levels, alone.mean(1))}
    system = certified(combine_radii(excluded, radii.numpy()))
    return figures | {"envelope": float(alone.max(0).mean()), "system": float(system.mean())}


def train_router(
    router_settings: RouterSettings, settings: TrainingSettings, accelerator: Accelerator
) -> dict[str, Any]:
    """
    Train a router, and save it to `settings.output_dir` with `training.json`: put the folder as `router` into that of the
    count head.

    The loss is the certified accuracy of the whole system, made smooth: the votes of noisy copies give the router's radii,
    the count head's predictions those of the classifier. The accuracy of the level that a single copy votes for is added,
    since a router that votes for all levels alike certifies nothing and has no gradient.

    Returns:
        The content of `training.json`.

    Raises:
        ValueError: for a count head or dataset that cannot be loaded; see [`TrainingLoop`].
    """
    started = time.perf_counter()
    pixels, radii = _read_images(router_settings, accelerator.device)
    seconds = time.perf_counter() - started
    gains = (radii[..., None] >= torch.tensor(RADII)).logical_and(radii[..., None] > 0).float().mean(-1)
    targets = torch.cat([radii, gains], 1)
    # in random order: images may be sorted by class
    order = torch.from_numpy(np.random.default_rng(settings.seed).permutation(len(pixels)))
    held_out, trained_on = order.tensor_split([max(1, round(router_settings.eval_share * len(pixels)))])
    router = LevelRouter(
        LevelRouterConfig(
            levels=router_settings.levels,
            noise_sigma=router_settings.noise_sigma,
            grid=router_settings.grid,
            num_channels=pixels.shape[1],
            hidden_size=router_settings.hidden_size,
        )
    )

    def compute_loss(model: Any, batch: torch.Tensor, batch_targets: torch.Tensor) -> torch.Tensor:
        batch_radii, batch_gains = batch_targets.chunk(2, 1)
        shares = _compute_shares(model, batch, router_settings.noise_sigma, router_settings.copies)
        single = (shares * batch_gains).sum(1).mean()
        return -single - soft_certified_share(shares, batch_radii, router_settings.noise_sigma)

    processes = (accelerator.process_index, accelerator.num_processes)
    batch_size = settings.per_device_train_batch_size
    batches = CountBatches(pixels[trained_on], targets[trained_on], batch_size, settings.seed, *processes)
    loop = TrainingLoop(
        router,
        batches,
        compute_loss,
        settings,
        accelerator,
        fixed_settings={**asdict(router_settings), "images": len(pixels)},
        evaluate=lambda model: evaluate_router(model, pixels[held_out], radii[held_out]),
    )
    results = {
        "command": command_line(),
        "settings": {**asdict(settings), **asdict(router_settings)},
        "preparation_seconds": seconds,
        **loop.run(),
        "versions": package_versions("accelerate", "datasets"),
    }
    if accelerator.is_main_process:
        write_json(results, Path(settings.output_dir) / "training.json")
    return results


def _read_images(router_settings: RouterSettings, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (uint8) of the images, and the radii that the count head predicts for them."""
    head = CountPredictor.from_pretrained(router_settings.count_head, device=device, calibrated=False)
    processor = AutoImageProcessor.from_pretrained(router_settings.count_head)
    images = LabelledImages(
        router_settings.dataset_name,
        split=router_settings.split,
        max_samples=router_settings.max_train_samples,
    )
    inputs = images.bind(head.class_names, Preprocessing.from_image_processor(processor))
    rows = [inputs[int(index)] for index in images.indices]
    pixels = torch.stack([(picture * 255).round().byte() for picture, _ in rows])
    return pixels, predict_radii(head, pixels, torch.tensor([label for _, label in rows]), router_settings.levels)
