"""From a picture to what a model takes, parted at the noise: what is before it, and what belongs to the base classifier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from .image_loading import load_image
from .noise import snap_to_8_bits

NoiseResolution = Literal["input", "native"] | int
"""Where noise is added: at the network's input, at the picture's own size, or at a height and width of so many pixels."""

Step = Callable[[torch.Tensor], torch.Tensor]


def read_resolution(text: str) -> NoiseResolution:
    """A resolution as the command line has it; whether there is such a one is for [`Preprocessing.of`] to say."""
    return int(text) if text.isdecimal() else text  # type: ignore[return-value]


@dataclass(frozen=True)
class Preprocessing:
    """
    The steps of an image processor.

    Attributes:
        before: from an RGB picture to pixels `(channels, height, width)`, to which noise is added.
        resize: from such pixels, `(batch, channels, height, width)` with noise, to the size the network takes; `None` where
            they have it. Differentiable, antialiased.
        mean, std: what the network's input is normalised with, one a channel, in units of `[0, 1]` pixels.
        noise_resolution: as asked for.
    """

    before: Callable[[Image.Image], torch.Tensor]
    resize: Step | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    noise_resolution: NoiseResolution

    @classmethod
    def of(cls, image_processor: Any, noise_resolution: NoiseResolution = "input") -> "Preprocessing":
        """
        Part an image processor of transformers (timm's among them).

        Args:
            image_processor: the processor.
            noise_resolution: where noise is added. A radius is about the pixels to which it is.

        Raises:
            ValueError: for a processor whose steps cannot be parted, with the reason; a resolution of another kind.
        """
        at_input = noise_resolution == "input"
        if (
            not at_input
            and noise_resolution != "native"
            and not (isinstance(noise_resolution, int) and noise_resolution > 0)
        ):
            raise ValueError(
                f"noise_resolution={noise_resolution!r} must be 'input' (the network's), 'native' (the picture's own) or a "
                "number of pixels a side."
            )
        if hasattr(image_processor, "val_transforms"):
            steps, mean, std = _timm_steps(image_processor)
        else:
            steps, mean, std = _transformers_steps(image_processor)
        before = steps if at_input else _keep if noise_resolution == "native" else _Square(noise_resolution)
        found = cls(before, None if at_input else _behind(image_processor), mean, std, noise_resolution)
        _refuse_other_steps(image_processor, cls(steps, None, mean, std, "input"), found)
        return found

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the network takes of pixels in `[0, 1]` at its size, noise included."""
        if self.mean is None or self.std is None:
            return pixels
        return (pixels - _column(self.mean, pixels.device)) / _column(self.std, pixels.device)


@lru_cache
def _column(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Once for each device: a copy to a GPU in every forward pass would make it wait."""
    with torch.inference_mode(False):  # what is made in that mode takes no part in an attack's gradients later
        return torch.tensor(values, device=device).view(-1, 1, 1)


def _picture(smooth: bool = False) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    if smooth:
        coarse = torch.rand((3, 6, 8), generator=generator)
        return functional.to_pil_image(functional.resize(coarse, [610, 830], antialias=True))
    return functional.to_pil_image(torch.randint(0, 256, (3, 61, 83), generator=generator, dtype=torch.uint8))


def same_pixels(one: Any, other: Any) -> bool:
    """Whether two image processors make the same pixels of a picture, before normalisation."""
    pixels = [Preprocessing.of(processor).before(_picture()) for processor in (one, other)]
    return pixels[0].shape == pixels[1].shape and torch.allclose(pixels[0], pixels[1], atol=1e-6)


def _refuse_other_steps(processor: Any, parted: "Preprocessing", found: "Preprocessing") -> None:
    """Compare with the processor itself, on pictures of chance: it may do more than its settings say."""
    picture = _picture()
    whole = processor(picture, return_tensors="pt")["pixel_values"]
    again = parted.normalize(parted.before(picture)[None])
    if whole.shape != again.shape or not torch.allclose(whole.float(), again, atol=1e-4):
        raise ValueError(
            f"{type(processor).__name__} does more than resize, crop, rescale and normalise, so its steps cannot be parted "
            "at the noise. Pass tensors in [0, 1] and a base classifier that does the rest itself."
        )
    if found.resize is None:
        return
    picture = _picture(smooth=True)  # on which interpolations hardly differ, but sizes and crops do
    input_pixels = parted.before(picture)
    resized = found.resize(functional.pil_to_tensor(picture)[None].float() / 255)[0]
    if resized.shape != input_pixels.shape or float((resized - input_pixels).abs().mean()) > 0.01:
        raise ValueError(
            f"{type(processor).__name__} resizes or crops in a way that is not done behind the noise here: use "
            "noise_resolution='input'."
        )


def _keep(picture: Image.Image) -> torch.Tensor:
    return functional.pil_to_tensor(picture)


@dataclass(frozen=True)
class _Square:
    side: Any

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        return functional.resize(functional.pil_to_tensor(picture), [self.side, self.side], antialias=True)


def _transformers_steps(processor: Any) -> tuple[Callable[[Image.Image], torch.Tensor], Any, Any]:
    name = type(processor).__name__
    for step, why in (
        ("do_pad", "pads"),
        ("do_color_quantize", "quantises colours"),
        ("do_split_image", "splits the image"),
    ):
        if getattr(processor, step, None):
            raise ValueError(
                f"{name} {why} ({step}), which cannot be parted from the noise. Pass tensors and a callable."
            )
    if not hasattr(processor, "do_rescale") or not hasattr(processor, "do_normalize"):
        raise ValueError(
            f"{name} does not say how it rescales and normalises, so its normalisation cannot be moved behind the noise. "
            "Pass tensors in [0, 1] and a base classifier that normalises them itself."
        )
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    offset = -1.0 if getattr(processor, "rescale_offset", False) else 0.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    # (x * scale + offset - mean) / std, as one mean and one std
    mean = tuple((float(one) - offset) / scale for one in mean)
    std = tuple(float(one) / scale for one in std)

    twice = {}
    if getattr(processor, "include_top", False):  # EfficientNet's divides by the std once more
        mean, std, twice = mean, tuple(one * own for one, own in zip(std, processor.image_std)), {"include_top": False}

    def before(picture: Image.Image) -> torch.Tensor:
        found = processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt", **twice)["pixel_values"]
        if found.ndim != 4 or len(found) != 1:
            raise ValueError(f"{name} makes pixels of shape {tuple(found.shape)} of one picture; it takes one image.")
        return found[0].float() / 255

    identity = not any(mean) and all(one == 1 for one in std)
    return before, None if identity else mean, None if identity else std


def _timm_steps(processor: Any) -> tuple[Callable[[Image.Image], torch.Tensor], Any, Any]:
    steps = list(processor.val_transforms.transforms)
    kinds = [type(step).__name__ for step in steps]
    if kinds[-1:] != ["Normalize"] or kinds.count("Normalize") != 1:
        raise ValueError(
            f"timm's transforms {kinds} do not end with their normalisation: it cannot be moved behind the noise."
        )

    def before(picture: Image.Image) -> torch.Tensor:
        found: Any = picture
        for step in steps[:-1]:
            found = step(found)
        return found

    mean, std = (tuple(torch.as_tensor(one).flatten().tolist()) for one in (steps[-1].mean, steps[-1].std))
    return before, mean, std


def _behind(processor: Any) -> Step:
    """Resize and crop as the processor does, on pixels with noise."""
    if hasattr(processor, "val_transforms"):
        steps = {type(step).__name__: step for step in processor.val_transforms.transforms}
        unknown = set(steps) - {"Resize", "CenterCrop", "MaybeToTensor", "ToTensor", "Normalize"}
        if unknown:
            raise ValueError(
                f"timm's transforms {sorted(unknown)} cannot be done behind the noise: use noise_resolution='input'."
            )
        size = steps["Resize"].size if "Resize" in steps else None
        resample = steps["Resize"].interpolation if "Resize" in steps else functional.InterpolationMode.BICUBIC
        crop = steps["CenterCrop"].size if "CenterCrop" in steps else None
        return _Behind(_pair(size), resample, _pair(crop), floors=False)
    size = _size_of(processor) if processor.do_resize else None
    crop = _both(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    if size is not None and (share := getattr(processor, "crop_pct", None)) is not None:  # ConvNeXt's way
        (edge,) = size
        # below 384 pixels it resizes to a little more than it takes, and crops; from there on to a square
        size, crop = ([int(edge / share)], [edge, edge]) if edge < 384 else ([edge, edge], None)
    resample = getattr(processor, "resample", None)
    return _Behind(size, 2 if resample is None else int(resample), crop)


@dataclass(frozen=True)
class _Behind:
    size: list[int] | None
    interpolation: Any
    crop: list[int] | None
    floors: bool = True
    """Where a margin is odd, transformers crops a pixel nearer to the top and left than torchvision does."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.size is not None:
            pixels = functional.resize(pixels, self.size, interpolation=self.interpolation, antialias=True)
        if self.crop is None:
            return pixels
        margins = [there - wanted for there, wanted in zip(pixels.shape[-2:], self.crop)]
        if not self.floors or min(margins) < 0:
            return functional.center_crop(pixels, self.crop)
        top, left = (margin // 2 for margin in margins)
        return pixels[..., top : top + self.crop[0], left : left + self.crop[1]]


def _size_of(processor: Any) -> list[int]:
    size = dict(processor.size)
    if {"height", "width"} <= size.keys():
        return _both(size)
    if "shortest_edge" in size and "longest_edge" not in size:
        return [size["shortest_edge"]]
    raise ValueError(
        f"{type(processor).__name__} resizes to {size}, which is not done behind the noise here: use "
        "noise_resolution='input'."
    )


def _both(size: Any) -> list[int]:
    return [size["height"], size["width"]]


def _pair(size: Any) -> list[int] | None:
    return None if size is None else [size] if isinstance(size, int) else list(size)


def to_pixels(image: Any, preprocessing: Preprocessing | None = None) -> torch.Tensor:
    """
    One image as a base classifier sees it before noise: float32, `(channels, height, width)`, in `[0, 1]`, on the CPU.

    Args:
        image: a tensor `(channels, height, width)`, float in `[0, 1]` or uint8; or what [`load_image`] takes.
        preprocessing: makes pixels of pictures.

    Raises:
        ValueError: for a tensor that does not hold pixels, or a picture without an image processor.
    """
    if not isinstance(image, torch.Tensor):
        if preprocessing is None:
            raise ValueError(
                f"A {type(image).__name__} needs an image processor: pass image_processor=... or tensors."
            )
        image = preprocessing.before(load_image(image))
    if image.ndim != 3:
        raise ValueError(f"An image has shape {tuple(image.shape)}; it takes (channels, height, width).")
    side = preprocessing.noise_resolution if preprocessing is not None else None
    if isinstance(side, int) and tuple(image.shape[1:]) != (side, side):
        raise ValueError(f"A tensor of shape {tuple(image.shape)} is not {side} pixels a side: pass a picture.")
    image = image.detach().to("cpu")
    image = snap_to_8_bits(image.float() / 255 if image.dtype == torch.uint8 else image.float())
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # NaN fails this too
        raise ValueError(
            f"An image has values from {low:g} to {high:g}: pixels must lie in [0, 1], since sigma and radii are in their "
            "units. Undo the normalisation; it belongs behind the noise."
        )
    return image
