"""Tries to break a claim: looks for the smallest change of a picture that changes the answer."""

from dataclasses import dataclass

import torch

from ..core.certificates import ABSTAIN
from ..core.lattice import choose_seed
from ..core.smoothing import SmoothedClassifier
from ..diagnostics.attacks import AttackSettings, Success, attack

_EFFORT = {"steps": 60, "draws": 4, "restarts": 1, "directions": 2, "n": 600}
"""Of one attack: some seconds on two idle CPU cores. An audit of a run takes far more, see `hf-smoothing audit`."""
_REACH = 3.0
_ATTACKS = 2
"""Where the first attack finds nothing up to 3 radii, a second one looks up to 9."""
_INSIDE = 0.999
_MAX_DRAWS = 1000


@dataclass(frozen=True)
class BreakAttempt:
    """
    What attacks on one claim found. All pictures are `(channels, height, width)` in `[0, 1]`.

    Attributes:
        prediction, radius: the claim.
        tried, steps: changes that were tried, and gradient steps.
        reach: norm of the largest change that was tried.
        original: the picture.
        changed, changed_to, norm: a picture whose answer differs, with a change of the smallest norm that was found, and its
            answer; `None` where none was found within reach.
        inside, inside_answer: the picture with the same change made smaller than the radius, and its answer; `ABSTAIN` where
            the draws do not prove one. `None` with `changed`, or where `changed` is inside itself.
    """

    prediction: int
    radius: float
    tried: int
    steps: int
    reach: float
    original: torch.Tensor
    changed: torch.Tensor | None = None
    changed_to: int = ABSTAIN
    norm: float = 0.0
    inside: torch.Tensor | None = None
    inside_answer: int = ABSTAIN

    @property
    def is_broken(self) -> bool:
        """Whether a change smaller than the radius changes the answer: the claim was wrong."""
        return self.changed is not None and self.norm < self.radius


def try_to_break(smoothed: SmoothedClassifier, pixels: torch.Tensor, prediction: int, radius: float) -> BreakAttempt:
    """
    Attack the claim that no change smaller than `radius` (above 0) changes `prediction`, with changes inside and outside.

    Raises:
        ValueError: for a radius of 0.
    """
    tried, steps, reach = 0, 0, radius
    success: Success | None = None
    for number in range(_ATTACKS):
        # one alpha for the judgements of all candidates: a failed one is judged a success with a negligible probability
        settings = AttackSettings(**_EFFORT, reach=_REACH, seed=choose_seed() % 2**31)
        start = radius * _REACH**number
        attempt = attack(smoothed, pixels, prediction, start, settings)
        tried, steps, reach, success = tried + attempt.tried, steps + attempt.steps, start * _REACH, attempt.smallest
        if success is not None:
            break
    found_nothing = BreakAttempt(prediction, radius, tried, steps, reach, pixels)
    if success is None:
        return found_nothing
    changed = (pixels + success.change).clamp(0, 1)
    inside, answer = None, ABSTAIN
    if success.norm >= radius:
        inside = pixels + success.change * (_INSIDE * radius / success.norm)
        (answer,) = smoothed.predict(inside[None], max_draws=_MAX_DRAWS)
    return BreakAttempt(
        prediction, radius, tried, steps, reach, pixels, changed, success.prediction, success.norm, inside, answer
    )
