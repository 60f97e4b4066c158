"""Attacks on a smoothed classifier, and the test of whether one succeeded.

An attack looks for a change of an image after which the smoothed classifier predicts another class. What it finds is a
candidate. Fresh draws, independent of the search, then judge whether the candidate is a success.

A classifier of two noise levels is attacked at both. Where its level is primary, the attack lowers the share of the class
there, alone, and together with that at the fallback level, which answers next. Where it is fallback, the attack also raises
another class at the primary level.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..core.certificates import ABSTAIN
from ..core.fallback_classifier import FallbackClassifier
from ..core.lattice import round_to_lattice
from ..core.noise import GaussianNoise
from ..core.sequential_rule import SequentialRule
from ..core.smoothing import SmoothedClassifier
from ..core.validation import check_count, check_share

STEP_SIZES = (0.05, 0.2, 1.0)
"""Step sizes of the gradient attack, as parts of the largest allowed norm."""

Goal = list[tuple[SmoothedClassifier, int, int]]
"""Smoothed classifiers, a class, and whether its share should shrink (1) or grow (-1)."""

Screening = tuple[tuple[int, float], ...]
"""Pairs: a number of draws, and the largest share of the certified class in them for a candidate to pass."""

_LENIENT: Screening = ((16, 0.8), (64, 0.6))
_STRICT: Screening = ((16, 0.6), (64, 0.4))

_FIRST_ALPHA = 0.05
"""Level of the first quarter of the draws, which decides whether the rest are made."""

_INSIDE = 0.999
"""Candidates use this part of the radius: a certificate holds for changes that are smaller than the radius."""

_NORMS = (_INSIDE, 1.25, 1.5, 2.0, 2.5, 3.0)
"""Norms to try in each direction, as multiples of the radius."""


@dataclass(frozen=True)
class AttackSettings:
    """
    The effort of an attack.

    Args:
        steps: gradient steps per image, over all starts and step sizes.
        draws: noisy copies per gradient step.
        restarts: starts of the gradient attack per step size: the first at the image itself, the others at random.
        directions: random directions.
        reach: largest norm to try, as a multiple of the radius.
        n: the most draws that judge a candidate, after a quarter as many that screen it.
        alpha: probability that a failed candidate is judged a success.
        seed: seed of everything random.

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
        for n, alpha in ((self.n, self.alpha), (self.n // 4, _FIRST_ALPHA)):
            try:
                SequentialRule((0.0,), alpha, max(n, 1)).check(GaussianNoise(1.0))
            except ValueError as error:
                raise ValueError(
                    f"n={self.n} draws are too few to judge a change at alpha={alpha:g}: {error}"
                ) from error
        if not 1 <= self.reach < math.inf:
            raise ValueError(f"reach={self.reach} must be 1 or more: it is a multiple of the certified radius.")


@dataclass(frozen=True)
class Success:
    """
    A change, to add to the image `(channels, height, width)`, after which the smoothed classifier predicts another class;
    its l2 norm in `[0, 1]` pixels, and the attack that found it.
    """

    attack: str
    norm: float
    prediction: int
    change: torch.Tensor


@dataclass(frozen=True)
class Attempt:
    """
    The result of the attacks on one certificate.

    Attributes:
        tried, steps: number of candidates, and of gradient steps.
        violation: a success with a norm below the radius, which contradicts the certificate.
        smallest: the success with the smallest norm, of any size; `None` where none was found within reach.
    """

    tried: int
    steps: int
    violation: Success | None
    smallest: Success | None


@dataclass(frozen=True)
class _Target:
    """An image `(channels, height, width)`, its certificate, and the settings of the attack."""

    smoothed: SmoothedClassifier
    pixels: torch.Tensor
    prediction: int
    radius: float
    settings: AttackSettings


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
        smoothed: a smoothed classifier with a differentiable base classifier.
        pixels: the image, `(channels, height, width)` in `[0, 1]`.
        prediction: the certified class.
        radius: the certified l2 radius, above 0.
        settings: the effort.
        others: images `(images, channels, height, width)` of other classes: one attack moves towards the nearest.

    Raises:
        ValueError: for a radius of 0.
    """
    if not radius > 0:
        raise ValueError(f"radius={radius} must be above 0: there is nothing to attack.")
    pixels = pixels.to(smoothed.device)
    target = _Target(smoothed, pixels, prediction, radius, settings)
    tried, steps, smallest, violation = 0, 0, None, None

    def passes(change: torch.Tensor, screening: Screening) -> bool:
        nonlocal tried
        tried += 1
        return _passes_screening(target, change, settings.seed + tried, screening)

    for name, direction, num_steps in _find_directions(target, others):
        steps += num_steps
        if not 0 < direction.norm() < math.inf:  # a vanishing gradient, or the image itself
            continue
        norms = [factor * radius for factor in _NORMS if factor <= settings.reach]
        norms = [norm for norm in norms if smallest is None or norm < smallest.norm]
        within, *beyond = [_clip_change(pixels, direction * (norm / direction.norm())) for norm in norms]
        candidates = [within] if passes(within, _LENIENT) else []
        # beyond the radius start with the largest norm, which succeeds most easily, and go down while candidates pass
        first = len(beyond)
        while first and passes(beyond[first - 1], _STRICT):
            first -= 1
        for change in candidates + beyond[first:]:
            if (other_class := judge(smoothed, pixels + change, prediction, settings)) is not None:
                smallest = Success(name, float(change.norm()), other_class, change.cpu())
                break
        if smallest is not None and smallest.norm < radius:
            violation = smallest
            break
    return Attempt(tried, steps, violation, smallest)


def judge(smoothed: SmoothedClassifier, pixels: torch.Tensor, prediction: int, settings: AttackSettings) -> int | None:
    """
    Predict one image with fresh draws, and return the class if it significantly differs from the certified one.

    Up to a quarter of `settings.n` draws end hopeless cases early. The judgement itself uses up to `settings.n` further
    draws, at `settings.alpha`, see [`SequentialRule`].
    """
    image = pixels[None].cpu()
    # far from every seed of a run: the certificate's own draws are never reused
    for n, alpha, seed in (
        (settings.n // 4, _FIRST_ALPHA, 2**62 - 1 - settings.seed),
        (settings.n, settings.alpha, 2**62 + settings.seed),
    ):
        (predicted,) = smoothed.predict(image, alpha, n, seed=seed)
        if predicted in (prediction, ABSTAIN):
            return None
    return predicted


def _find_directions(target: _Target, others: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Names of attacks, the directions they found, and their gradient steps; the cheapest first."""
    pixels, radius, settings = target.pixels, target.radius, target.settings
    generator = torch.Generator(pixels.device).manual_seed(settings.seed)
    if others is not None and len(others):
        differences = others.to(pixels.device) - pixels
        yield "nearest other class", differences[differences.flatten(1).norm(dim=1).argmin()], 0
    for _ in range(settings.directions):
        yield "random direction", _draw_normal(pixels, generator), 0
    runs = [
        (goal, size, start)
        for start in range(settings.restarts)
        for size in STEP_SIZES
        for goal in _find_goals(target)
    ]
    for number, ((aim, goal), size, start) in enumerate(runs):
        steps = settings.steps // len(runs) + (number < settings.steps % len(runs))
        # half of the steps search within the radius, half beyond it, where directions are easier to find
        for max_norm, num_steps in ((_INSIDE * radius, steps - steps // 2), (settings.reach * radius, steps // 2)):
            if num_steps:
                direction = _ascend_gradient(target, goal, max_norm, size, num_steps, generator, start > 0)
                yield f"gradient{aim}, step {size:g} of the norm, start {start}", direction, num_steps


def _find_goals(target: _Target) -> list[tuple[str, Goal]]:
    """What gradients can climb, each with a note for the name of the attack."""
    smoothed, prediction = target.smoothed, target.prediction
    if not isinstance(smoothed, FallbackClassifier):
        return [("", [(smoothed, prediction, 1)])]
    primary, fallback = (smoothed.primary, prediction, 1), (smoothed.fallback, prediction, 1)
    level, votes = smoothed.choose_level(target.pixels, target.settings.seed)
    if level is smoothed.primary:
        return [(" of the class", [primary]), (" of the class at both levels", [primary, fallback])]
    rival = max((count, label) for label, count in enumerate(votes) if label != prediction)[1]
    return [(" of the class", [fallback]), (" of the level", [(smoothed.primary, rival, -1)])]


def _ascend_gradient(
    target: _Target,
    goal: Goal,
    max_norm: float,
    size: float,
    steps: int,
    generator: torch.Generator,
    random_start: bool,
) -> torch.Tensor:
    """Projected gradient ascent on the loss of a class under noise (arXiv 1906.04584); of several, on their sum."""
    pixels = target.pixels
    change, momentum = torch.zeros_like(pixels), torch.zeros_like(pixels)
    if random_start:
        change = _draw_normal(pixels, generator)
        change *= max_norm / change.norm()
    for step in range(steps):
        change = change.detach().requires_grad_()
        momentum = 0.9 * momentum
        for smoothed, answer, sign in goal:
            sigma = smoothed.noise.sigma
            noise = torch.randn((target.settings.draws, *pixels.shape), generator=generator, device=pixels.device)
            logits = smoothed.base_classifier([round_to_lattice(pixels + change + sigma * noise)], sigma)
            # the share of draws that give the answer has no gradient; the mean probability has
            loss = -sign * logits.log_softmax(1)[:, answer].logsumexp(0)
            (gradient,) = torch.autograd.grad(loss, change)
            momentum = momentum + gradient / gradient.norm().clamp(min=1e-12)
        length = size * max_norm * (1 - step / steps)
        change = change.detach() + length * momentum / momentum.norm().clamp(min=1e-12)
        change = _clip_change(pixels, change * min(1.0, max_norm / float(change.norm().clamp(min=1e-12))))
    return change if bool(change.any()) else _draw_normal(pixels, generator)


def _clip_change(pixels: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Clip a change so that pixels stay in `[0, 1]`; its norm does not grow."""
    return (pixels + change).clamp(0, 1) - pixels


def _draw_normal(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(pixels.shape, generator=generator, device=pixels.device)


@torch.inference_mode()
def _passes_screening(target: _Target, change: torch.Tensor, seed: int, screening: Screening) -> bool:
    """Whether a few draws leave it possible that the prediction has changed, so that judging is worth its draws."""
    pixels, smoothed = target.pixels + change, target.smoothed
    if isinstance(smoothed, FallbackClassifier):
        smoothed, _ = smoothed.choose_level(pixels, seed)
    sigma = smoothed.noise.sigma
    generator = torch.Generator(pixels.device).manual_seed(seed)
    for draws, share in screening:
        noise = torch.randn((draws, *pixels.shape), generator=generator, device=pixels.device)
        predictions = smoothed.base_classifier([round_to_lattice(pixels + sigma * noise)], sigma).argmax(1)
        if float((predictions == target.prediction).float().mean()) > share:
            return False
    return True
