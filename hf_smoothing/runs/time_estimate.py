"""How long a certification will take, told before it starts."""

import time

import torch

from ..core.rule_protocols import Rule
from ..core.smoothing import SmoothedClassifier
from ..core.two_stage_rule import TwoStageRule

SHORT_SECONDS = 20.0
"""Work that takes less is not announced."""


@torch.inference_mode()
def measure_seconds_per_draw(smoothed: SmoothedClassifier, pixels: torch.Tensor) -> float:
    """Seconds per forward pass of a noisy copy of `pixels` `(channels, height, width)`, from two batches of draws."""
    batch = [pixels.to(smoothed.device).expand(smoothed.batch_size, *pixels.shape)]
    sigma = smoothed.noise.sigma
    smoothed.base_classifier(batch, sigma).cpu()  # the first pass is slower
    started = time.perf_counter()
    smoothed.base_classifier(batch, sigma).cpu()
    return (time.perf_counter() - started) / smoothed.batch_size


def announce_time(rule: Rule, seconds_per_draw: float, images: int, processes: int = 1) -> str | None:
    """
    What to tell the user before long work, or None before work of less than [`SHORT_SECONDS`].

    Args:
        rule: the sampling rule.
        seconds_per_draw: of one process.
        images: how many; at several noise levels, each level counts.
        processes: that share the work.
    """
    draws, at_most = rule.budget, "at most "
    if rule.method in ("fixed", "counts"):
        at_most = ""
    elif isinstance(rule, TwoStageRule):
        draws, at_most = rule.draws, ""
    if not rule.uses_base_classifier or (seconds := images * draws * seconds_per_draw / processes) < SHORT_SECONDS:
        return None
    pictures = "1 image" if images == 1 else f"{images:,} images"
    return (
        f"This takes {at_most}about {format_seconds(seconds)}: {at_most}{draws:,} draws for each of {pictures}, "
        f"{processes / seconds_per_draw:,.0f} draws per second."
    )


def format_seconds(seconds: float) -> str:
    """A time to one or two digits: `40 seconds`, `3 minutes`, `2.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.2g} hours" if seconds < 172800 else f"{seconds / 86400:.2g} days"
