"""One classifier of two noise levels: it backs off to the second one where the noisy copies do not agree."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from .agreement import (
    AGREEMENT,
    ALPHA_SHARES,
    AgreementRule,
    bound_agreement,
    check_agreement,
    radius_of_fallback,
    radius_of_primary,
)
from .certificates import ABSTAIN, Certificate, LevelChoice
from .fixed_rule import FixedRule
from .lattice import SampledNoise
from .noise import GaussianNoise, SmoothingNoise
from .progress_bar import ProgressBar
from .rule_protocols import Rule
from .sampler import in_order
from .smoothing import SmoothedClassifier
from .two_stage_plan import STAGES
from .two_stage_rule import TwoStageRule

_IMAGES_TOGETHER = 64
"""Images whose draws share batches."""

_LESS = 4
"""Where the level is primary, the fallback's certificate only adds to it: it is planned for so many times fewer draws."""

_LEAST_DRAWS = 256
"""
Draws that bound the agreement: so many, or up to half of those of the fallback's certificate where that is more; in any case
no more than one certificate may take.
"""

_VOTES = 128
"""Draws that estimate the level of a picture, where nothing is claimed."""


@dataclass
class _Picture:
    """What is known of a picture: certificates at the two levels, the draws that bound the agreement."""

    noise: SampledNoise
    primary: Certificate
    stays_primary: float
    fallback: Certificate | None = None
    p_upper: float = 1.0
    agreement_draws: int = 0


class FallbackClassifier(SmoothedClassifier):
    """
    The smoothed classifier that answers with the primary noise level where more than a share `agreement` of the noisy copies
    agree, else with the fallback level. Make it with [`SmoothedClassifier.with_fallback`].

    A certificate takes up to three steps. (1) The classifier is certified at the primary level. (2) If this proves that the
    level is primary, and the fallback could enlarge the radius, it is certified at the fallback level with fewer draws. (3)
    Else it is certified at the fallback level, and further draws at the primary level bound how far the picture must move
    before the level can change. `core/agreement.py` states what this proves, and proves it.

    Args:
        primary: the classifier at the primary level.
        fallback: at the fallback level. It may have another base classifier.
        agreement: from 0.5 to below 1.

    Raises:
        ValueError: for equal levels, an agreement out of range, noise that is not Gaussian.
    """

    def __init__(self, primary: SmoothedClassifier, fallback: SmoothedClassifier, agreement: float = AGREEMENT):
        self.levels = (primary.noise.sigma, fallback.noise.sigma)
        check_agreement(self.levels, agreement)
        if others := {primary.noise.name, fallback.noise.name} - {GaussianNoise.name}:
            raise ValueError(f"A fallback level takes Gaussian noise, not {', '.join(sorted(others))}.")
        vars(self).update(vars(primary))
        self.primary, self.fallback, self.agreement = primary, fallback, agreement

    def with_noise(self, noise: SmoothingNoise) -> SmoothedClassifier:
        """The classifier at one noise level, without a fallback."""
        return self.primary.with_noise(noise)

    def choose_level(self, pixels: torch.Tensor, seed: int) -> tuple[SmoothedClassifier, tuple[int, ...]]:
        """
        The classifier at the level of an image `(channels, height, width)`, as a few draws at the primary level estimate it,
        and how often they got each class.
        """
        ((_, votes),) = self.primary.certify_stream([pixels.cpu()], AgreementRule(_VOTES), seed=seed)
        return self.primary if max(votes.counts) > self.agreement * _VOTES else self.fallback, votes.counts

    def check_rule(self, rule: Rule) -> None:
        if not isinstance(rule, TwoStageRule | FixedRule):
            raise ValueError(
                f"method={rule.method!r} has no meaning with sigma='auto', which finds radii: use two-stage or fixed, "
                "without radius and radii."
            )
        for smoothed, share in zip((self.primary, self.fallback), ALPHA_SHARES):
            smoothed.check_rule(replace(rule, alpha=share * rule.alpha))

    def _rule_to_predict(self, alpha: float, max_draws: int) -> Rule:
        return TwoStageRule(alpha=alpha, max_draws=max_draws)

    def _certify(
        self, images: Iterable[torch.Tensor], rule: Rule, seed: int, bar: ProgressBar | None
    ) -> Iterator[tuple[int, Certificate]]:
        waiting, position = iter(images), 0
        while chunk := list(islice(waiting, _IMAGES_TOGETHER)):
            for certificate in self._certify_together(chunk, rule, seed):  # type: ignore[arg-type]
                if bar is not None:
                    bar.finish([certificate.num_samples], [certificate.radius])
                yield position, certificate
                position += 1
            if bar is not None:
                bar.show()

    def _certify_together(
        self, images: list[torch.Tensor], rule: TwoStageRule | FixedRule, seed: int
    ) -> list[Certificate]:
        at_primary, at_fallback = (replace(rule, alpha=share * rule.alpha) for share in ALPHA_SHARES[:2])
        fewer_draws = _with_fewer_draws(at_fallback)
        pictures = []
        for pixels, primary in zip(images, _draw(self.primary, images, at_primary, seed)):
            noise = SampledNoise(self.primary.noise, pixels.numel())
            stays_primary = radius_of_primary(primary.p_lower, self.agreement, noise)
            pictures.append(_Picture(noise, primary, stays_primary))
        in_reach = fewer_draws.largest_radius(self.fallback.noise)
        unsure = [number for number, picture in enumerate(pictures) if not picture.stays_primary]
        gaining = [
            number
            for number, picture in enumerate(pictures)
            if 0 < picture.stays_primary < min(picture.primary.radius, in_reach)
        ]
        for numbers, level_rule in ((unsure, at_fallback), (gaining, fewer_draws)):
            certificates = _draw(self.fallback, [images[number] for number in numbers], level_rule, seed)
            for number, certificate in zip(numbers, certificates):
                pictures[number].fallback = certificate
        self._bound_agreements(pictures, images, rule, seed)
        return [self._combine(picture, rule.alpha) for picture in pictures]

    def _bound_agreements(
        self, pictures: list[_Picture], images: list[torch.Tensor], rule: TwoStageRule | FixedRule, seed: int
    ) -> None:
        """Set `p_upper` of the pictures where it can enlarge the radius."""
        alpha = ALPHA_SHARES[2] * rule.alpha
        needed: dict[int, list[int]] = {}
        for number, picture in enumerate(pictures):
            fallback, counts = picture.fallback, np.array(picture.primary.counts)
            if picture.stays_primary or fallback is None or fallback.radius <= _radius_for(picture.primary, fallback):
                continue
            # how many draws is decided before any of them is seen; a power of two, so that images share batches
            draws = 1 << (min(max(_LEAST_DRAWS, fallback.num_samples // 2), rule.budget).bit_length() - 1)
            if counts.sum() >= draws:
                picture.p_upper = bound_agreement(counts, alpha)
            elif not counts.sum() or counts.max() < self.agreement * counts.sum():  # else there is no hope
                needed.setdefault(draws, []).append(number)
        for draws, numbers in needed.items():
            certificates = _draw(self.primary, [images[number] for number in numbers], AgreementRule(draws), seed)
            for number, counted in zip(numbers, certificates):
                pictures[number].p_upper = bound_agreement(counted.counts, alpha)
                pictures[number].agreement_draws = draws

    def _combine(self, picture: _Picture, alpha: float) -> Certificate:
        """The certificate of a picture, see `agreement.py`."""
        primary, fallback, stays_primary = picture.primary, picture.fallback, picture.stays_primary
        stays_fallback = radius_of_fallback(picture.p_upper, self.agreement, picture.noise)
        in_use = primary if stays_primary or fallback is None else fallback
        radius = min(
            max(stays_fallback, _radius_for(primary, in_use)),
            max(stays_primary, 0.0 if fallback is None else _radius_for(fallback, in_use)),
        )
        draws = (primary.num_samples, 0 if fallback is None else fallback.num_samples, picture.agreement_draws)
        choice = LevelChoice(
            levels=self.levels,
            agreement=self.agreement,
            p_lower=primary.p_lower,
            p_upper=picture.p_upper,
            radius=stays_primary or stays_fallback,
            predictions=(primary.prediction, ABSTAIN if fallback is None else fallback.prediction),
            radii=(primary.radius, 0.0 if fallback is None else fallback.radius),
            alphas=(ALPHA_SHARES[0] * alpha, ALPHA_SHARES[1] * alpha, ALPHA_SHARES[2] * alpha),
            num_samples=draws,
        )
        claim: dict[str, Any] = {} if radius > 0 else {"prediction": ABSTAIN, "p_lower": 0.0, "p_upper": 1.0}
        return replace(
            in_use, radius=max(radius, 0.0), alpha=alpha, num_samples=sum(draws), level_choice=choice, **claim
        )


def _draw(smoothed: SmoothedClassifier, images: list[torch.Tensor], rule: Rule, seed: int) -> list[Certificate]:
    """Certificates of images at one level, in their order."""
    return list(in_order(smoothed.certify_stream(images, rule, seed=seed)))


def _radius_for(certificate: Certificate, other: Certificate) -> float:
    """The radius of a certificate if it is about the same class as another, else 0."""
    return certificate.radius if certificate.prediction == other.prediction else 0.0


def _with_fewer_draws(rule: TwoStageRule | FixedRule) -> TwoStageRule | FixedRule:
    if isinstance(rule, TwoStageRule):
        return replace(rule, draws=max(rule.draws // _LESS, STAGES[0] + 1))
    return replace(rule, n=max(rule.n // _LESS, 1), radius=None)
