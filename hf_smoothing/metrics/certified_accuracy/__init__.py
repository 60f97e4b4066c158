"""Certified accuracy: pure functions, and a thin `evaluate.Metric` on top."""

from .certified_accuracy import DEFAULT_THRESHOLDS as DEFAULT_THRESHOLDS
from .certified_accuracy import CertifiedAccuracy as CertifiedAccuracy
from .certified_accuracy import certified_accuracy as certified_accuracy
from .certified_accuracy import certified_accuracy_curve as certified_accuracy_curve
from .certified_accuracy import mark_out_of_reach as mark_out_of_reach
from .shares import exact_interval as exact_interval
