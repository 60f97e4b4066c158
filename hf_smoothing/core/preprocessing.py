"""From a picture to pixels, and from noisy pixels to the network's input: an image processor, parted at the noise."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import Compose
from torchvision.transforms.v2 import functional

from .image_loading import load_image
from .validation import NoiseResolution, check_noise_resolution

PictureStep = Callable[[Image.Image], torch.Tensor]
PixelStep = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """
    The steps of an image processor, parted at the noise.

    Attributes:
        picture_to_pixels: from an RGB picture to pixels `(channels, height, width)`, to which noise is added.
        resize: after the noise, from pixels `(batch, channels, height, width)` to the input size of the network; `None`
            where they have it. Differentiable, antialiased.
        mean, std: after the noise, what the input is normalised with, one value per channel, in units of `[0, 1]` pixels.
        noise_resolution: where noise is added.
    """

    picture_to_pixels: PictureStep
    resize: PixelStep | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    noise_resolution: NoiseResolution

    @classmethod
    def from_image_processor(cls, processor: Any, noise_resolution: NoiseResolution = "input") -> "Preprocessing":
        """
        Part an image processor of transformers (or timm's) at the noise.

        Raises:
            ValueError: for a processor whose steps cannot be parted, with the reason; for an invalid resolution.
        """
        check_noise_resolution(noise_resolution)
        get_steps = _timm_steps if hasattr(processor, "val_transforms") else _transformers_steps
        picture_to_input, mean, std = get_steps(processor)
        preprocessing = at_input = cls(picture_to_input, None, mean, std, "input")
        if noise_resolution != "input":
            sides = None if noise_resolution == "native" else [noise_resolution] * 2
            preprocessing = cls(_Resize(sides), _resize_after_noise(processor), mean, std, noise_resolution)
        _check_against_processor(processor, at_input, preprocessing)
        return preprocessing

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise pixels in `[0, 1]`, noise included, for the network."""
        if self.mean is None or self.std is None:
            return pixels
        return (pixels - _per_channel(self.mean, pixels.device)) / _per_channel(self.std, pixels.device)


_ROUNDING = 2**-22
"""How far rounding in float32 may take pixels beyond 0 and 1."""


def to_pixels(image: Any, preprocessing: Preprocessing | None = None) -> torch.Tensor:
    """
    Convert an image to the pixels to which noise is added: a float32 tensor `(channels, height, width)` in `[0, 1]`, on the
    CPU.

    Args:
        image: a tensor `(channels, height, width)`, float in `[0, 1]` or uint8; or anything that [`load_image`] takes.
        preprocessing: converts pictures to pixels. Without it, a picture keeps its size.

    Raises:
        ValueError: for a tensor that does not hold pixels.
    """
    if not isinstance(image, torch.Tensor):
        picture = load_image(image)
        image = (
            functional.pil_to_tensor(picture) if preprocessing is None else preprocessing.picture_to_pixels(picture)
        )
    if image.ndim != 3:
        raise ValueError(f"An image has shape {tuple(image.shape)}, but must have (channels, height, width).")
    side = preprocessing.noise_resolution if preprocessing is not None else None
    if isinstance(side, int) and tuple(image.shape[1:]) != (side, side):
        raise ValueError(f"A tensor of shape {tuple(image.shape)} is not {side} pixels a side: pass a picture.")
    # in one memory order for all images: a GPU rounds differently in another one
    image = image.detach().to("cpu").contiguous()
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    low, high = float(image.min()), float(image.max())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN fails this too
        raise ValueError(
            f"An image has values from {low:g} to {high:g}: pixels must lie in [0, 1], since sigma and radii are in their "
            "units. Undo the normalisation; it belongs after the noise."
        )
    return image


def make_same_pixels(processor: Any, other: Any) -> bool:
    """Whether two image processors make the same pixels of a picture, before normalisation."""
    pixels, other_pixels = (
        Preprocessing.from_image_processor(each).picture_to_pixels(_random_picture()) for each in (processor, other)
    )
    return pixels.shape == other_pixels.shape and torch.allclose(pixels, other_pixels, atol=1e-6)


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Values as a tensor, made once per device: a copy to a GPU in every forward pass would make it wait."""
    with torch.inference_mode(False):  # a tensor made in inference mode cannot take part in an attack's gradients
        return torch.tensor(values, device=device).view(-1, 1, 1)


def _random_picture(smooth: bool = False) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    if smooth:
        coarse = torch.rand((3, 6, 8), generator=generator)
        return functional.to_pil_image(functional.resize(coarse, [610, 830], antialias=True))
    return functional.to_pil_image(torch.randint(0, 256, (3, 61, 83), generator=generator, dtype=torch.uint8))


def _check_against_processor(processor: Any, at_input: Preprocessing, preprocessing: Preprocessing) -> None:
    """Compare with the processor itself on random pictures: it may do more than its settings tell."""
    picture = _random_picture()
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    pixels = at_input.normalize(at_input.picture_to_pixels(picture)[None])
    if expected.shape != pixels.shape or not torch.allclose(expected.float(), pixels, atol=1e-4):
        raise ValueError(
            f"{type(processor).__name__} does more than resize, crop, rescale and normalise: it cannot be parted at the "
            "noise. Pass tensors in [0, 1] and a base classifier that does the rest itself."
        )
    if preprocessing.resize is None:
        return
    picture = _random_picture(smooth=True)  # here interpolations hardly differ, but sizes and crops do
    input_pixels = at_input.picture_to_pixels(picture)
    resized = preprocessing.resize(functional.pil_to_tensor(picture)[None].float() / 255)[0]
    if resized.shape != input_pixels.shape or float((resized - input_pixels).abs().mean()) > 0.01:
        raise ValueError(
            f"{type(processor).__name__} resizes or crops in a way that is not available after the noise: use "
            "noise_resolution='input'."
        )


@dataclass(frozen=True)
class _Resize:
    sides: Any
    """Height and width; `None` keeps the size."""

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        pixels = functional.pil_to_tensor(picture)
        return pixels if self.sides is None else functional.resize(pixels, self.sides, antialias=True)


def _transformers_steps(processor: Any) -> tuple[PictureStep, Any, Any]:
    name = type(processor).__name__
    for step in ("do_pad", "do_color_quantize", "do_split_image"):
        if getattr(processor, step, None):
            raise ValueError(f"{name} has {step}=True, which cannot be parted from the noise: pass tensors in [0, 1].")
    if not hasattr(processor, "do_rescale") or not hasattr(processor, "do_normalize"):
        raise ValueError(
            f"{name} does not say how it rescales and normalises, so its normalisation cannot be moved after the noise. "
            "Pass tensors in [0, 1] and a base classifier that normalises them itself."
        )
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    offset = -1.0 if getattr(processor, "rescale_offset", False) else 0.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    # (x * scale + offset - mean) / std, written with a single mean and std
    mean = tuple((float(value) - offset) / scale for value in mean)
    std = tuple(float(value) / scale for value in std)

    options = {}
    if getattr(processor, "include_top", False):  # EfficientNet's divides by the std once more
        std = tuple(value * again for value, again in zip(std, processor.image_std))
        options = {"include_top": False}

    def picture_to_input(picture: Image.Image) -> torch.Tensor:
        inputs = processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt", **options)
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4 or len(pixels) != 1:
            raise ValueError(f"{name} makes pixels of shape {tuple(pixels.shape)}, but must make one image.")
        return pixels[0].float() / 255

    is_identity = not any(mean) and all(value == 1 for value in std)
    return picture_to_input, None if is_identity else mean, None if is_identity else std


def _timm_steps(processor: Any) -> tuple[PictureStep, Any, Any]:
    steps = list(processor.val_transforms.transforms)
    kinds = [type(step).__name__ for step in steps]
    if kinds[-1:] != ["Normalize"] or kinds.count("Normalize") != 1:
        raise ValueError(f"timm's transforms {kinds} do not end with Normalize: it cannot be moved after the noise.")
    mean, std = (tuple(torch.as_tensor(values).flatten().tolist()) for values in (steps[-1].mean, steps[-1].std))
    return Compose(steps[:-1]), mean, std


def _resize_after_noise(processor: Any) -> PixelStep:
    """A step that resizes and crops noisy pixels as the processor does pictures."""
    if hasattr(processor, "val_transforms"):
        steps = {type(step).__name__: step for step in processor.val_transforms.transforms}
        if unknown := set(steps) - {"Resize", "CenterCrop", "MaybeToTensor", "ToTensor", "Normalize"}:
            raise ValueError(f"timm's {sorted(unknown)} do not work after the noise: use noise_resolution='input'.")
        resize, crop = steps.get("Resize"), getattr(steps.get("CenterCrop"), "size", None)
        resample = getattr(resize, "interpolation", functional.InterpolationMode.BICUBIC)
        return _ResizeAndCrop(_to_list(getattr(resize, "size", None)), resample, _to_list(crop), rounds_down=False)
    size = _get_size(processor) if processor.do_resize else None
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    crop = None if crop is None else [crop["height"], crop["width"]]
    if size is not None and (share := getattr(processor, "crop_pct", None)) is not None:  # ConvNeXt's way
        (edge,) = size
        # below 384 pixels it resizes to a bit more than the input and crops; from there on it resizes to a square
        size, crop = ([int(edge / share)], [edge, edge]) if edge < 384 else ([edge, edge], None)
    resample = getattr(processor, "resample", None)
    return _ResizeAndCrop(size, 2 if resample is None else int(resample), crop)


@dataclass(frozen=True)
class _ResizeAndCrop:
    size: list[int] | None
    interpolation: Any
    crop: list[int] | None
    rounds_down: bool = True
    """Where a margin is odd, transformers crops one pixel nearer to the top and left than torchvision does."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.size is not None:
            pixels = functional.resize(pixels, self.size, interpolation=self.interpolation, antialias=True)
        if self.crop is None:
            return pixels
        margins = [available - wanted for available, wanted in zip(pixels.shape[-2:], self.crop)]
        if not self.rounds_down or min(margins) < 0:
            return functional.center_crop(pixels, self.crop)
        top, left = (margin // 2 for margin in margins)
        return pixels[..., top : top + self.crop[0], left : left + self.crop[1]]


def _get_size(processor: Any) -> list[int]:
    size = dict(processor.size)
    if {"height", "width"} <= size.keys():
        return [size["height"], size["width"]]
    if "shortest_edge" in size and "longest_edge" not in size:
        return [size["shortest_edge"]]
    raise ValueError(f"Resizing to {size} is not available after the noise: use noise_resolution='input'.")


def _to_list(size: Any) -> list[int] | None:
    return None if size is None else [size] if isinstance(size, int) else list(size)
