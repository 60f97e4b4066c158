"""Attacks on a smoothed classifier, and the test of whether one succeeded.

An attack looks for a picture near another one on which the smoothed classifier answers otherwise. What it finds is a
candidate: whether it is a success is for fresh draws to say, which know nothing of how it was found.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..core.certificates import ABSTAIN
from ..core.smoothing import SmoothedClassifier
from ..core.validation import check_count, check_share

STEP_SIZES = (0.05, 0.2, 1.0)
"""Steps of the gradient attack, as parts of the largest norm allowed."""

Screening = tuple[tuple[int, float], ...]
"""Numbers of draws, and the share of the certified answer in them above which a candidate is not worth judging."""

_IN_DOUBT: Screening = ((16, 0.8), (64, 0.6))
_CLEARLY: Screening = ((16, 0.6), (64, 0.4))

_FIRST_ALPHA = 0.05
"""Level of the quarter of draws that says whether a candidate is worth judging."""

_INSIDE = 0.999
"""Candidates keep this part of the radius: a certificate speaks of changes smaller than it."""

_PARTS = (_INSIDE, 1.25, 1.5, 2.0, 2.5, 3.0)
"""Norms along each way that was found, as parts of the radius."""


@dataclass(frozen=True)
class AttackSettings:
    """
    How hard to try.

    Args:
        steps: gradient steps an image, over all restarts and step sizes.
        draws: noisy copies in each step.
        restarts: random beginnings of the gradient attack for each step size; the first of all begins at the picture.
        directions: random directions.
        reach: how far beyond the radius to look, as a multiple of it.
        n: draws that judge a candidate, after a quarter as many that say whether it is worth it.
        alpha: probability that a candidate is wrongly judged to have succeeded.
        seed: of everything that is random.

    Raises:
        ValueError: for a setting out of range.
    """

    steps: int = 1000
    draws: int = 8
    restarts: int = 2
    directions: int = 20
    reach: float = 3.0
    n: int = 2000
    alpha: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "draws", "restarts", "directions", "n"):
            check_count(name, getattr(self, name))
        check_share("alpha", self.alpha)
        # as few as can show anything when all of them agree, of the judgement and of the quarter that comes before it
        fewest = max(math.ceil(math.log2(2 / self.alpha)), 4 * math.ceil(math.log2(2 / _FIRST_ALPHA)))
        if self.n < fewest:
            raise ValueError(f"n={self.n} draws can show nothing at alpha={self.alpha:g}: it takes {fewest} at least.")
        if not 1 <= self.reach < math.inf:
            raise ValueError(f"reach={self.reach} must be 1 or more: it is a multiple of the certified radius.")


@dataclass(frozen=True)
class Success:
    """
    A picture on which the smoothed classifier answers otherwise.

    Attributes:
        attack: how it was found.
        norm: l2 norm of the change, in `[0, 1]` pixels.
        prediction: the other answer.
        change: `(channels, height, width)`, what to add to the picture.
    """

    attack: str
    norm: float
    prediction: int
    change: torch.Tensor


@dataclass(frozen=True)
class Attempt:
    """
    What attacks on one certificate came to.

    Attributes:
        tried: candidates.
        steps: gradient steps.
        violation: a success smaller than the radius, which should not exist.
        smallest: the smallest success found, however large; `None` where nothing within reach succeeded.
    """

    tried: int
    steps: int
    violation: Success | None
    smallest: Success | None


def attack(
    smoothed: SmoothedClassifier,
    pixels: torch.Tensor,
    prediction: int,
    radius: float,
    settings: AttackSettings,
    others: torch.Tensor | None = None,
) -> Attempt:
    """
    Attack the certificate of one image.

    Args:
        smoothed: the classifier, whose base classifier is differentiable.
        pixels: the image, `(channels, height, width)` in `[0, 1]`.
        prediction: the certified answer.
        radius: the certified radius, above 0, in l2.
        settings: how hard to try.
        others: other images `(images, channels, height, width)`, of other classes; the nearest is gone towards.

    Raises:
        ValueError: for a radius that is not above 0.
    """
    if not radius > 0:
        raise ValueError(f"radius={radius} must be above 0: there is nothing to attack.")
    pixels = pixels.to(smoothed.device)
    tried, steps, smallest, violation = 0, 0, None, None

    def changed(change: torch.Tensor, screening: Screening) -> bool:
        nonlocal tried
        tried += 1
        return _looks_changed(smoothed, pixels + change, prediction, settings.seed + tried, screening)

    for name, direction, taken in _candidates(smoothed, pixels, prediction, radius, settings, others):
        steps += taken
        if not 0 < direction.norm() < math.inf:  # a gradient that says nothing, or the picture itself
            continue
        norms = [part * radius for part in _PARTS if part <= settings.reach]
        norms = [norm for norm in norms if smallest is None or norm < smallest.norm]
        within, *beyond = [_inside_the_box(pixels, direction * (norm / direction.norm())) for norm in norms]
        worth_judging = [within] if changed(within, _IN_DOUBT) else []
        # beyond the radius from the far end, where a way that leads anywhere shows it, as near as it still shows
        place = len(beyond)
        while place and changed(beyond[place - 1], _CLEARLY):
            place -= 1
        for change in worth_judging + beyond[place:]:
            if (answer := judge(smoothed, pixels + change, prediction, settings)) is not None:
                smallest = Success(name, float(change.norm()), answer, change.cpu())
                break
        if smallest is not None and smallest.norm < radius:
            violation = smallest
            break
    return Attempt(tried, steps, violation, smallest)


def judge(smoothed: SmoothedClassifier, pixels: torch.Tensor, prediction: int, settings: AttackSettings) -> int | None:
    """
    The smoothed answer to one image by fresh draws, where it is another than the certified one, and beyond doubt.

    A quarter of `settings.n` draws come first: where they leave doubt, the others are saved. The judgement itself rests on
    `settings.n` further ones (algorithm PREDICT of Cohen et al. 2019, at `settings.alpha`).
    """
    image = pixels[None].cpu()
    # far from every seed of a run, so that no draw is one that the certificate rests on
    for n, alpha, seed in (
        (settings.n // 4, _FIRST_ALPHA, 2**62 - 1 - settings.seed),
        (settings.n, settings.alpha, 2**62 + settings.seed),
    ):
        (answer,) = smoothed.predict(image, n, alpha, seed=seed)
        if answer in (prediction, ABSTAIN):
            return None
    return answer


def _candidates(
    smoothed: SmoothedClassifier,
    pixels: torch.Tensor,
    prediction: int,
    radius: float,
    settings: AttackSettings,
    others: torch.Tensor | None,
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Names, directions, and the gradient steps that each took; the cheapest first."""
    generator = torch.Generator(pixels.device).manual_seed(settings.seed)
    if others is not None and len(others):
        apart = others.to(pixels.device) - pixels
        yield "nearest other class", apart[apart.flatten(1).norm(dim=1).argmin()], 0
    for _ in range(settings.directions):
        yield "random direction", _normal(pixels, generator), 0
    runs = [(size, start) for start in range(settings.restarts) for size in STEP_SIZES]
    for number, (size, start) in enumerate(runs):
        steps = settings.steps // len(runs) + (number < settings.steps % len(runs))
        # half of the steps look within the radius, half beyond it, where the way is clearer to see
        for allowed, share in ((_INSIDE * radius, steps - steps // 2), (settings.reach * radius, steps // 2)):
            if share:
                found = _ascend(smoothed, pixels, prediction, allowed, size, share, settings, generator, start > 0)
                yield f"gradient, step {size:g} of the norm, start {start}", found, share


def _ascend(
    smoothed: SmoothedClassifier,
    pixels: torch.Tensor,
    prediction: int,
    allowed: float,
    size: float,
    steps: int,
    settings: AttackSettings,
    generator: torch.Generator,
    random_start: bool,
) -> torch.Tensor:
    """Projected gradient ascent on how seldom the base classifier says `prediction` under noise (arXiv 1906.04584)."""
    change = _normal(pixels, generator) if random_start else torch.zeros_like(pixels)
    if random_start:
        change *= allowed / change.norm()
    momentum, sigma = torch.zeros_like(pixels), smoothed.noise.sigma
    for step in range(steps):
        change = change.detach().requires_grad_()
        noise = torch.randn((settings.draws, *pixels.shape), generator=generator, device=pixels.device)
        logits = smoothed.base_classifier([pixels + change + sigma * noise], sigma)
        # the share of `prediction` itself has no gradient; its mean probability has
        loss = -logits.log_softmax(1)[:, prediction].logsumexp(0)
        (gradient,) = torch.autograd.grad(loss, change)
        momentum = 0.9 * momentum + gradient / gradient.norm().clamp(min=1e-12)
        length = size * allowed * (1 - step / steps)
        change = change.detach() + length * momentum / momentum.norm().clamp(min=1e-12)
        change = _inside_the_box(pixels, change * min(1.0, allowed / float(change.norm().clamp(min=1e-12))))
    return change if bool(change.any()) else _normal(pixels, generator)


def _inside_the_box(pixels: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The change that keeps pixels in `[0, 1]`; its norm does not grow."""
    return (pixels + change).clamp(0, 1) - pixels


def _normal(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(pixels.shape, generator=generator, device=pixels.device)


@torch.inference_mode()
def _looks_changed(
    smoothed: SmoothedClassifier, pixels: torch.Tensor, prediction: int, seed: int, screening: Screening
) -> bool:
    """Whether a few draws leave it open that the answer has changed: only then it is worth judging."""
    generator, sigma = torch.Generator(pixels.device).manual_seed(seed), smoothed.noise.sigma
    for draws, share in screening:
        noise = torch.randn((draws, *pixels.shape), generator=generator, device=pixels.device)
        answers = smoothed.base_classifier([pixels + sigma * noise], sigma).argmax(1)
        if float((answers == prediction).float().mean()) > share:
            return False
    return True


__all__ = ["AttackSettings", "Attempt", "Success", "attack", "judge"]
