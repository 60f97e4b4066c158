"""The certificates of one picture at several noise levels, which are several classifiers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .certificates import Certificate
from .lattice import choose_seed
from .validation import check_share

if TYPE_CHECKING:
    from .smoothing import SmoothedClassifier


@dataclass(frozen=True)
class LevelCertificates:
    """
    The certificates of one image, one per noise level; with probability at least 1 - alpha all of them hold at once.

    Attributes:
        certificates: in the order of the noise levels. The alpha of each is an equal part of `alpha`.
        alpha: probability that any of them is wrong.
    """

    certificates: tuple[Certificate, ...]
    alpha: float

    @property
    def best_of(self) -> dict[int, Certificate]:
        """
        For each class that any level predicts, the certificate with the largest radius; the largest first.

        This is a statement about several classifiers, and not about one. It says: the classifier *at this noise level*
        predicts this class for all pictures within this radius. It does not say how the levels compare elsewhere: for
        a picture nearby, another level may have the largest radius, with another class. So who takes the largest
        radius as the answer has no certificate for it. One classifier of two levels, with a certificate that
        covers the choice, is [`FallbackClassifier`].
        """
        claimed = [certificate for certificate in self.certificates if not certificate.abstains]
        best: dict[int, Certificate] = {}
        for certificate in sorted(claimed, key=lambda certificate: -certificate.radius):
            best.setdefault(certificate.prediction, certificate)
        return best

    @property
    def statement(self) -> str:
        """What the certificates say together, in words."""
        levels = ", ".join(f"{certificate.sigma:g}" for certificate in self.certificates)
        return (
            f"A statement about {len(self.certificates)} classifiers, one per noise level ({levels}), not about one: each "
            f"radius is that of the classifier at its level, and all hold at once with probability {1 - self.alpha:g}. "
            "For a picture nearby, another level may have the largest radius, with another class: taking the largest is no "
            "certified classifier."
        )

    def to_dict(self) -> dict[str, Any]:
        """The statement and the certificates as plain dicts, ready for JSON; `best_of` has the level of each class."""
        best = [
            {name: getattr(certificate, name) for name in ("prediction", "radius", "sigma")}
            for certificate in self.best_of.values()
        ]
        certificates = [certificate.to_dict() for certificate in self.certificates]
        return {"best_of": best, "statement": self.statement, "alpha": self.alpha, "certificates": certificates}


def certify_levels(
    smoothed: "SmoothedClassifier",
    images: Any,
    sigmas: Sequence[float],
    method: str | None = None,
    *,
    alpha: float = 0.001,
    seed: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> list[LevelCertificates]:
    """
    Certify images at several noise levels, with alpha split evenly over them.

    Args:
        smoothed: the classifier; its noise level does not matter, the kind of noise does.
        images: a batch or a list, as for [`SmoothedClassifier.certify`].
        sigmas: the noise levels.
        method: the rule; its guarantee must be `per_input`.
        alpha: probability that any certificate of an image is wrong.
        seed: seed of the noise.
        progress: show a progress bar for each level.
        **settings: of the method.

    Raises:
        ValueError: for noise levels that repeat, another guarantee, and as [`SmoothedClassifier.certify`].
    """
    if not sigmas or len(set(sigmas)) < len(sigmas):
        raise ValueError(f"sigmas={list(sigmas)} must be one or more different noise levels.")
    check_share("alpha", alpha)
    levels = [smoothed.with_noise(type(smoothed.noise)(sigma)) for sigma in sigmas]
    for level in levels:  # before the first draw at any level
        rule = level.make_rule(method, alpha=alpha / len(sigmas), **settings)
        if rule.guarantee != "per_input":
            raise ValueError(
                f"method={method!r} does not guarantee per_input, as sigmas must: give one sigma at a time."
            )
        rule.check(level.noise)
    images = list(images)  # an iterator is read once
    shared = {"alpha": alpha / len(sigmas), "seed": choose_seed() if seed is None else seed, "progress": progress}
    columns = [level.certify(images, method, **shared, **settings) for level in levels]
    return [LevelCertificates(certificates, alpha) for certificates in zip(*columns)]
