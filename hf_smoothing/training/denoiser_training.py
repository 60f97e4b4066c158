"""Training a diffusion model as denoiser: at the noise levels of smoothing, for one step (arXiv 2206.10550)."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers.hf_argparser import HfArg

from ..core.diffusion_denoiser import DiffusionDenoiser, require_diffusers
from ..core.preprocessing import Preprocessing
from ..core.progress_bar import open_bar
from ..data.labelled_images import LabelledImages
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .batches import Batch, Batches
from .pretrained_classifiers import create_image_processor
from .training_loop import TrainingLoop, TrainingSettings

_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass
class DenoiserSettings:
    """
    The diffusion model, and what it is trained on.

    Raises:
        ImportError: where `diffusers` is not installed.
        ValueError: for a setting out of range.
    """

    dataset_name: str = HfArg(help="dataset: name on the Hub, local folder (also of image files), or Parquet file")
    dataset_config_name: str | None = HfArg(default=None, help="configuration of the dataset")
    train_split: str = HfArg(default="train", help="split to train on")
    image_column: str | None = HfArg(default=None, help="column of the images (default: img or image)")
    label_column: str | None = HfArg(default=None, help="column of the labels, which are not used (default: as usual)")
    max_train_samples: int | None = HfArg(default=None, help="largest number of training images, chosen at random")
    dataloader_num_workers: int = HfArg(default=0, help="processes that read images at the start")
    image_size: int = HfArg(default=32, help="height and width in pixels; images are resized to it and held in memory")
    block_out_channels: list[int] = HfArg(
        default_factory=lambda: [32, 64, 128],
        help="channels of the U-Net at each resolution, halved from one to the next",
    )
    layers_per_block: int = HfArg(default=2, help="residual blocks at each resolution")
    beta_schedule: str = HfArg(default="linear", help=f"noise schedule of 1,000 steps: {', '.join(_BETA_SCHEDULES)}")
    sigma_min: float = HfArg(default=0.05, help="smallest noise level to train on, in [0, 1] pixels")
    sigma_max: float = HfArg(
        default=1.2, help="largest noise level; one step of denoising needs no levels above those of smoothing"
    )
    hflip: float = HfArg(default=0.5, help="probability of a horizontal flip; 0 for digits and letters")

    def __post_init__(self) -> None:
        require_diffusers()
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be above 0 and below sigma_max={self.sigma_max}.")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip={self.hflip:g} must be a probability, between 0 and 1.")
        if self.beta_schedule not in _BETA_SCHEDULES:
            raise ValueError(f"beta_schedule={self.beta_schedule!r} must be one of {', '.join(_BETA_SCHEDULES)}.")
        factor = 2 ** (len(self.block_out_channels) - 1)
        if self.image_size % factor:
            raise ValueError(f"image_size={self.image_size} must be a multiple of {factor}: the U-Net halves it.")


def create_denoiser(settings: DenoiserSettings) -> DiffusionDenoiser:
    """A `UNet2DModel` without attention, with random weights, and its `DDPMScheduler`."""
    from diffusers import DDPMScheduler, UNet2DModel

    channels = settings.block_out_channels
    model = UNet2DModel(
        sample_size=settings.image_size,
        block_out_channels=channels,
        layers_per_block=settings.layers_per_block,
        down_block_types=["DownBlock2D"] * len(channels),
        up_block_types=["UpBlock2D"] * len(channels),
        norm_num_groups=min(16, *channels),
        add_attention=False,
    )
    return DiffusionDenoiser(model, DDPMScheduler(beta_schedule=settings.beta_schedule))


def train_denoiser(
    denoiser_settings: DenoiserSettings, settings: TrainingSettings, accelerator: Accelerator
) -> dict[str, Any]:
    """
    Train a diffusion model to predict the noise at the timesteps of the noise levels asked for, all equally often. Saves
    model and scheduler to `settings.output_dir`, where [`DiffusionDenoiser.from_pretrained`] finds them, and the results to
    `results/training.json` in it.

    Returns:
        The content of `results/training.json`.

    Raises:
        ValueError: see [`TrainingLoop`]; for images that cannot be read, or noise levels outside the schedule.
    """
    torch.manual_seed(settings.seed)
    denoiser = create_denoiser(denoiser_settings)
    with accelerator.main_process_first():  # the main process downloads the dataset, the others read its cache
        images = LabelledImages(
            denoiser_settings.dataset_name,
            config_name=denoiser_settings.dataset_config_name,
            split=denoiser_settings.train_split,
            image_column=denoiser_settings.image_column,
            label_column=denoiser_settings.label_column,
            max_samples=denoiser_settings.max_train_samples,
        )
    compute_loss = _create_loss(denoiser, denoiser_settings)
    pixels = _read_pixels(images, denoiser_settings, accelerator.is_main_process)
    batches = _PixelBatches(pixels, settings, accelerator)
    loop = TrainingLoop(
        denoiser.model,
        batches,
        compute_loss,
        settings,
        accelerator,
        processor=denoiser.scheduler,
        fixed_settings={**asdict(denoiser_settings), "dataset_fingerprint": images.fingerprint},
    )
    results = {
        "command": command_line(),
        "settings": {**asdict(settings), **asdict(denoiser_settings)},
        **loop.run(),
        "versions": package_versions("accelerate", "datasets", "diffusers"),
    }
    if accelerator.is_main_process:
        results_dir = Path(settings.output_dir) / "results"
        results_dir.mkdir(exist_ok=True)
        write_json(results, results_dir / "training.json")
    return results


def _create_loss(
    denoiser: DiffusionDenoiser, settings: DenoiserSettings
) -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The mean squared error of the predicted noise (Ho et al. 2020), of pixels (uint8) at random timesteps."""
    first, last = (denoiser.find_timestep(sigma) for sigma in (settings.sigma_min, settings.sigma_max))

    def compute_loss(model: Any, pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        flipped = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < settings.hflip
        sample = torch.where(flipped, pixels.flip(-1), pixels).float() / 127.5 - 1
        timesteps = torch.randint(first, last + 1, (len(pixels),), device=pixels.device)
        noise = torch.randn_like(sample)
        predicted = model(denoiser.scheduler.add_noise(sample, noise, timesteps), timesteps).sample
        return nn.functional.mse_loss(predicted, noise)

    return compute_loss


class _PixelBatches(Batches):
    """Batches of images in memory, without targets."""

    def __init__(self, pixels: torch.Tensor, settings: TrainingSettings, accelerator: Accelerator):
        processes = (accelerator.process_index, accelerator.num_processes)
        super().__init__(len(pixels), settings.per_device_train_batch_size, settings.seed, *processes)
        self.pixels = pixels

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        for images in self.shuffle(number)[first:]:
            yield self.pixels[images], torch.empty(0)


def _read_pixels(images: LabelledImages, settings: DenoiserSettings, show_progress: bool) -> torch.Tensor:
    """Pixels, uint8 `(images, channels, height, width)`, read in processes beside this one where that is asked for."""
    processor = create_image_processor(settings.image_size)
    rows = _Rows(images, Preprocessing.from_image_processor(processor), settings.image_size)
    parts = []
    with open_bar(desc="reading images", total=len(rows), disable=not show_progress) as progress_bar:
        for part in DataLoader(rows, batch_size=64, num_workers=settings.dataloader_num_workers):
            parts.append(part)
            progress_bar.update(len(part))
    return torch.cat(parts)


@dataclass(eq=False)
class _Rows(Dataset):
    """Pixels, uint8, of images, by their position among the chosen ones."""

    images: LabelledImages
    preprocessing: Preprocessing
    size: int

    def __len__(self) -> int:
        return len(self.images.indices)

    def __getitem__(self, position: int) -> torch.Tensor:
        picture = self.images.picture(self.images.source[self.images.indices[position]])
        if picture.size == (self.size, self.size):
            return pil_to_tensor(picture)
        return (self.preprocessing.picture_to_pixels(picture) * 255).round().byte()
