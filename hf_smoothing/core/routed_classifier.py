"""One classifier for all noise levels: a smoothed router chooses the level of each picture."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from .base_classifier import Classifier
from .certificates import ABSTAIN, Certificate, Routing
from .fixed_rule import FixedRule
from .lattice import SampledNoise, choose_seed
from .noise import SmoothingNoise
from .progress_bar import ProgressBar
from .routing import ROUTER_SHARE, VoteRule, combine_radii, exclusion_radii, median_levels
from .rule_protocols import FloatArray, Rule
from .smoothing import SmoothedClassifier
from .two_stage_plan import STAGES
from .two_stage_rule import TwoStageRule
from .validation import check_count

_IMAGES_TOGETHER = 64
"""Images whose draws share batches."""

_OTHER_LEVELS = 4
"""At each further level that a certificate needs, the plan is for so many times fewer draws: two such levels add half."""


class RoutedClassifier(SmoothedClassifier):
    """
    The smoothed classifier `g(x) = f_level(x)(x)`: a router, itself smoothed, chooses the noise level of the picture.
    Make it with [`SmoothedClassifier.with_router`].

    A certificate takes three steps. (1) The router's votes, a fixed number, give the level, and for each other level a
    radius within which the router does not choose it. (2) The classifier is certified at the level. (3) At a level
    whose radius in (1) is smaller than that of (2), the classifier is certified too: within that radius, both must
    agree. `core/routing.py` states what this proves, and proves it.

    Args:
        at_level: the classifier at each level, noise ascending. They may have different base classifiers.
        router: maps pixels with noise `(batch, channels, height, width)` to a score for each level, `(batch, levels)`.
        noise: the router's own, of the classifier's kind. The router's radius limits the certificate's, so its noise
            should be as large as the largest level.
        router_draws: votes per image.

    Raises:
        ValueError: for levels that are not ascending, router noise of another kind, a setting out of range.

    Source: routers of this kind, and the smaller of the two radii: Dual Randomized Smoothing (2025, arXiv 2512.01782).
    """

    def __init__(
        self,
        at_level: Sequence[SmoothedClassifier],
        router: Classifier,
        noise: SmoothingNoise,
        router_draws: int = VoteRule.n,
    ):
        check_count("router_draws", router_draws)
        self.levels = tuple(smoothed.noise.sigma for smoothed in at_level)
        if not at_level or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels={self.levels} must be different noise levels in ascending order.")
        if kinds := {smoothed.noise.name for smoothed in at_level} - {noise.name}:
            raise ValueError(f"The router's noise is {noise.name}, the classifier's {', '.join(kinds)}.")
        largest = at_level[-1]  # the largest radii are its
        vars(self).update(vars(largest))
        self.at_level = list(at_level)
        self.router = SmoothedClassifier(router, noise, batch_size=largest.batch_size, device=largest.device)
        self.router_draws = router_draws

    def with_noise(self, noise: SmoothingNoise) -> SmoothedClassifier:
        """The classifier at one noise level, without the router."""
        return self.at_level[-1].with_noise(noise)

    def choose_level(self, pixels: torch.Tensor, seed: int) -> int:
        """The median level of the votes for an image `(channels, height, width)`, as an index: an estimate of its level."""
        stream = self.router.certify_stream([pixels.cpu()], VoteRule(self.router_draws), seed=seed)
        return int(median_levels(np.array([certificate.counts for _, certificate in stream]))[0])

    def _rule_to_predict(self, alpha: float, max_draws: int) -> Rule:
        return TwoStageRule(alpha=alpha, max_draws=max_draws)

    def certify_stream(
        self,
        images: Iterable[torch.Tensor],
        rule: Rule,
        *,
        seed: int | None = None,
        progress: bool = False,
        total: int | None = None,
    ) -> Iterator[tuple[int, Certificate]]:
        """As [`SmoothedClassifier.certify_stream`], for the rules `two-stage` and `fixed`. Alpha is that of the whole."""
        if not isinstance(rule, TwoStageRule | FixedRule):
            raise ValueError(
                f"method={rule.method!r} has no meaning with sigma='auto', which finds radii: use two-stage or fixed, "
                "without radius and radii."
            )
        rule.check(self.noise)
        seed = choose_seed() if seed is None else seed
        if total is None and isinstance(images, Sized):
            total = len(images)
        bar = ProgressBar(total) if progress else None
        try:
            waiting, start = iter(images), 0
            while chunk := list(islice(waiting, _IMAGES_TOGETHER)):
                for position, certificate in enumerate(self._certify_together(chunk, rule, seed)):
                    if bar is not None:
                        bar.finish([certificate.num_samples], [certificate.radius])
                    yield start + position, certificate
                start += len(chunk)
                if bar is not None:
                    bar.show()
        finally:
            if bar is not None:
                bar.close()

    def _certify_together(
        self, images: list[torch.Tensor], rule: TwoStageRule | FixedRule, seed: int
    ) -> list[Certificate]:
        router_alpha = ROUTER_SHARE * rule.alpha
        rule_at_level = replace(rule, alpha=rule.alpha - router_alpha)
        voted = dict(self.router.certify_stream(images, VoteRule(self.router_draws), seed=seed))
        votes = np.array([voted[image].counts for image in range(len(images))])
        if votes.shape[1] != len(self.levels):
            raise ValueError(f"The router returned {votes.shape[1]} scores for {len(self.levels)} levels.")
        noises = [SampledNoise(self.router.noise, image.numel()) for image in images]
        excluded = np.stack([exclusion_radii(row, noise, router_alpha) for row, noise in zip(votes, noises)])
        chosen = median_levels(votes)
        at_chosen: dict[int, Certificate] = {}
        for level in range(len(self.levels)):
            at_chosen |= self._certify_at(level, np.flatnonzero(chosen == level), images, rule_at_level, seed)
        certified = [at_chosen[image] for image in range(len(images))]
        radii = np.zeros(votes.shape)
        num_samples = np.array([certificate.num_samples for certificate in certified])
        radii[np.arange(len(images)), chosen] = [certificate.radius for certificate in certified]
        needed = (excluded < radii.max(1, keepdims=True)) & (np.arange(len(self.levels)) != chosen[:, None])
        fewer_draws = _with_fewer_draws(rule_at_level)
        for level in range(len(self.levels)):
            others = self._certify_at(level, np.flatnonzero(needed[:, level]), images, fewer_draws, seed)
            for image, other in others.items():
                num_samples[image] += other.num_samples
                radii[image, level] = other.radius * (other.prediction == certified[image].prediction)
        alphas = router_alpha, rule_at_level.alpha
        return [
            self._combine(certificate, int(draws), voted[image], excluded[image], radii[image], alphas)
            for image, (certificate, draws) in enumerate(zip(certified, num_samples))
        ]

    def _certify_at(
        self, level: int, which: np.ndarray, images: list[torch.Tensor], rule: Rule, seed: int
    ) -> dict[int, Certificate]:
        """Certificates of some of the images at one level."""
        stream = self.at_level[level].certify_stream([images[image] for image in which], rule, seed=seed)
        return {int(which[position]): certificate for position, certificate in stream}

    def _combine(
        self,
        certificate: Certificate,
        num_samples: int,
        voted: Certificate,
        excluded: FloatArray,
        radii: FloatArray,
        alphas: tuple[float, float],
    ) -> Certificate:
        """The certificate of one image from that of the chosen level, and the radii `(levels,)` of all levels."""
        radius = float(combine_radii(excluded, radii))
        kept = (excluded < radius) | (np.array(self.levels) == certificate.sigma)
        routing = Routing(
            levels=self.levels,
            votes=voted.counts,
            sigma=self.router.noise.sigma,
            alpha=alphas[0],
            classifier_alpha=alphas[1],
            kept=tuple(np.array(self.levels)[kept].tolist()),
            radius=None if kept.all() else float(excluded[~kept].min()),
            classifier_radius=float(radii[kept].min()),
            num_samples=voted.num_samples,
            level_num_samples=certificate.num_samples,
        )
        claim: dict[str, Any] = {} if radius > 0 else {"prediction": ABSTAIN, "p_lower": 0.0, "p_upper": 1.0}
        return replace(
            certificate, radius=radius, alpha=sum(alphas), num_samples=num_samples, routing=routing, **claim
        )


def _with_fewer_draws(rule: TwoStageRule | FixedRule) -> Rule:
    if isinstance(rule, TwoStageRule):
        return replace(rule, draws=max(rule.draws // _OTHER_LEVELS, STAGES[0] + 1))
    return replace(rule, n=max(rule.n // _OTHER_LEVELS, 1), radius=None)
