"""Certified accuracy: pure functions, and a thin `evaluate.Metric` on top."""

from .certified_accuracy import (
    DEFAULT_THRESHOLDS,
    CertifiedAccuracy,
    certified_accuracy,
    certified_accuracy_curve,
    exact_interval,
)

__all__ = [
    "DEFAULT_THRESHOLDS",
    "CertifiedAccuracy",
    "certified_accuracy",
    "certified_accuracy_curve",
    "exact_interval",
]
