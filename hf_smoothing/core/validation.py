"""Checks of settings: each raises a `ValueError` that names the value and says what it must be."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

NoiseResolution = Literal["input", "native"] | int
"""Where noise is added: at the network's input, at the picture's own size, or at a square of so many pixels a side."""


def check_probability(name: str, value: ArrayLike) -> None:
    values = np.asarray(value, np.float64)[()]
    if not ((values > 0) & (values < 1)).all():
        raise ValueError(f"{name}={value!r} must lie strictly between 0 and 1.")


def check_count(name: str, value: int) -> None:

    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")


def check_share(name: str, value: float) -> None:
    """As [`check_probability`], for a single number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a number strictly between 0 and 1.")
    check_probability(name, value)


def check_radius(radius: float) -> None:

    if not isinstance(radius, Real) or isinstance(radius, bool) or not 0 <= radius < math.inf:
        raise ValueError(f"radius={radius!r} must be a finite number, 0 or above.")


def check_radii(radii: Sequence[float]) -> None:

    if not radii:
        raise ValueError("radii=() asks for nothing: give one or more radii, or None to find the radius.")
    for radius in radii:
        check_radius(radius)


def check_noise_resolution(value: NoiseResolution) -> None:
    if value not in ("input", "native") and not (isinstance(value, int) and value > 0):
        raise ValueError(
            f"noise_resolution={value!r} must be 'input' (the network's), 'native' (the picture's own) or a number of "
            "pixels a side."
        )


def parse_noise_resolution(text: str) -> NoiseResolution:
    """Convert text from the command line; [`check_noise_resolution`] checks the result."""
    return int(text) if text.isdecimal() else text  # type: ignore[return-value]
