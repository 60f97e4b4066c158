"""Checks of settings: each raises an error that names the value."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike


def check_probability(name: str, value: ArrayLike) -> None:
    """Raise a `ValueError` that names the value unless all of `value` lies strictly between 0 and 1."""
    values = np.asarray(value, np.float64)[()]
    if not ((values > 0) & (values < 1)).all():
        raise ValueError(f"{name}={value!r} must lie strictly between 0 and 1.")


def check_count(name: str, value: int) -> None:
    """Raise a `ValueError` that names the value unless it is a whole number above 0."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")


def check_share(name: str, value: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a number strictly between 0 and 1.")
    check_probability(name, value)


def check_radius(radius: float) -> None:
    if not isinstance(radius, Real) or isinstance(radius, bool) or not 0 <= radius < math.inf:
        raise ValueError(f"radius={radius!r} must be a finite number, 0 or above.")


def check_radii(radii: Sequence[float]) -> None:
    """Raise a `ValueError` unless these are radii to decide."""
    if not radii:
        raise ValueError("radii=() asks for nothing: give one or more radii, or None to find the radius.")
    for radius in radii:
        check_radius(radius)
