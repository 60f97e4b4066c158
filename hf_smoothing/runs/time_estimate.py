"""How long a certification will take, told before it starts."""

import sys
import time

import torch

from ..core.fallback_classifier import FallbackClassifier
from ..core.rule_protocols import Rule
from ..core.smoothing import SmoothedClassifier
from ..core.two_stage_rule import TwoStageRule

SHORT_SECONDS = 20.0
"""Work that takes less is not announced."""

_FEW_DRAWS = 10_000
"""For fewer draws, the speed is not even measured."""

_CPU_BATCH = 16
"""On a CPU, a small batch shows the speed of a large one."""


@torch.inference_mode()
def measure_seconds_per_draw(smoothed: SmoothedClassifier, pixels: torch.Tensor) -> float:
    """Seconds per forward pass of a noisy copy of `pixels` `(channels, height, width)`, from two batches."""
    size = min(smoothed.batch_size, _CPU_BATCH) if smoothed.device.type == "cpu" else smoothed.batch_size
    batch = [pixels.to(smoothed.device).expand(size, *pixels.shape)]
    smoothed.base_classifier(batch, smoothed.noise.sigma).cpu()  # the first pass is slower
    started = time.perf_counter()
    smoothed.base_classifier(batch, smoothed.noise.sigma).cpu()
    return (time.perf_counter() - started) / size


def announce_time(
    rule: Rule, smoothed: SmoothedClassifier, pixels: torch.Tensor, images: int, processes: int = 1
) -> bool:
    """
    Print to standard error how long work will take, if it takes long; return whether it does.

    Args:
        rule: the sampling rule.
        smoothed: the classifier.
        pixels: an image, to measure the speed with.
        images: how many; at several noise levels, each level counts.
        processes: that share the work.
    """
    if not rule.uses_base_classifier or images * _count_draws(rule)[0] < _FEW_DRAWS:
        return False
    notice = describe_time(rule, measure_seconds_per_draw(smoothed, pixels), images, processes)
    if notice is not None and isinstance(smoothed, FallbackClassifier):
        notice += " Images whose noisy copies do not agree need draws at both levels, up to about twice as many."
    if notice is not None:
        print(notice, file=sys.stderr, flush=True)
    return notice is not None


def describe_time(rule: Rule, seconds_per_draw: float, images: int, processes: int = 1) -> str | None:
    """What [`announce_time`] prints, given the speed of one process; None for work of less than [`SHORT_SECONDS`]."""
    draws, at_most = _count_draws(rule)
    seconds = images * draws * seconds_per_draw / processes
    if seconds < SHORT_SECONDS:
        return None
    time, speed = format_seconds(seconds), f"{processes / seconds_per_draw:,.0f} draws per second"
    pictures = "1 image" if images == 1 else f"{images:,} images"
    if isinstance(rule, TwoStageRule):
        one = f"an easy one takes more, at most {rule.max_draws:,}; more --draws prove larger radii"
        return f"This takes about {time} on average: {draws:,} draws per image ({one}), {pictures}, {speed}."
    each = "" if images == 1 else "each of "
    return f"This takes {at_most}about {time}: {at_most}{draws:,} draws for {each}{pictures}, {speed}."


def _count_draws(rule: Rule) -> tuple[int, str]:
    """The draws per image, and `at most ` where they are the largest number."""
    if isinstance(rule, TwoStageRule):
        return min(rule.draws, rule.max_draws), ""
    return rule.budget, "" if rule.method in ("fixed", "counts") else "at most "


def format_seconds(seconds: float) -> str:
    """A time to one or two digits: `40 seconds`, `3 minutes`, `2.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.2g} hours" if seconds < 172800 else f"{seconds / 86400:.2g} days"
