"""From a source (a path, an address, bytes, a PIL image) to an RGB picture."""

import io
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def load_image(source: Any) -> Image.Image:
    """
    Load an RGB picture as a viewer shows it.

    16-bit and float greys are scaled to 8 bits, transparent pixels are put on white, the EXIF orientation is applied.

    Args:
        source: a path, an `http(s)://` address, the bytes of a picture file, a PIL image, or a uint8 array
            `(height, width[, channels])`.

    Returns:
        A PIL image in mode `RGB`.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for content that is not a readable picture; the message names the source.
        TypeError: for any other source.
    """
    if isinstance(source, np.ndarray) and source.dtype == np.uint8:
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "The image")
    if not isinstance(source, (str, Path, bytes)):
        kind = f"{source.dtype} array" if isinstance(source, np.ndarray) else type(source).__name__
        raise TypeError(f"An image must be a path, an http(s) address, a PIL image or a uint8 array, not {kind}.")
    name = repr(str(source)) if not isinstance(source, bytes) else f"A file of {len(source):,} bytes"
    try:
        content = source if isinstance(source, bytes) else _read(str(source))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no image at {name}.") from None
    except (OSError, ValueError, HTTPException) as error:  # ValueErrors are malformed addresses
        raise ValueError(f"{name} cannot be read as a picture: {error}.") from error
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in a format that Pillow can read.") from None
    # Pillow raises OSError for truncated files, SyntaxError for broken PNG chunks
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}.") from error
    return _to_rgb(image, name)


def _read(source: str) -> bytes:
    if source.startswith(("http://", "https://")):
        with urlopen(Request(source, headers={"User-Agent": "hf-smoothing"}), timeout=60) as response:
            return response.read()
    return Path(source).read_bytes()


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these to 255 on conversion: a 16-bit scan would come out white
        grey = np.asarray(image, np.float64)
        if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"{name} has {image.mode!r} pixels from {grey.min():g} to {grey.max():g}: scale them to 8 bits (0 to 255)."
            )
        top = 1 if image.mode == "F" and grey.max() <= 1 else 255
        if image.mode.startswith("I;16") or grey.max() > 255:
            top = 65535
        return Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")
