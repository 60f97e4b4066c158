"""The options of `certify-dataset`, declared once: `scripts/certify.py` and the command line are made from them."""

# ruff: noqa: RUF009 (_option makes a dataclass field)

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ..core.validation import check_count, check_noise_resolution, parse_noise_resolution

if TYPE_CHECKING:  # imported where they are used, so that the command line shows help without loading torch
    from ..core.calibration import Calibration
    from ..core.noise import GaussianNoise
    from ..core.preprocessing import NoiseResolution
    from ..core.rule_protocols import Rule

    NoiseLevel = Any  # a float, or AUTO


AUTO = "auto"
"""In place of a noise level: one classifier of two noise levels."""

if not TYPE_CHECKING:

    class NoiseLevel:
        """What the command lines read a noise level with: a float, or `"auto"`."""

        def __new__(cls, text: str | float) -> float | str:
            return AUTO if text == AUTO else float(text)


def _option(help: str, *aliases: str, **default: Any) -> Any:
    metadata = {"help": help, "aliases": list(aliases)} if aliases else {"help": help}
    return field(metadata=metadata, **default)


@dataclass(frozen=True)
class RunSettings:
    """
    Settings that determine the records of a run. A run can only be resumed with the same settings.

    The help texts say what each field means. Radii and noise levels are in `[0, 1]` pixels.

    Raises:
        ValueError: for a setting out of range.
    """

    model_name_or_path: str = _option("image classifier: a name on the Hub or a local folder", "--model")
    dataset_name: str = _option(
        "dataset: a name on the Hub, a local folder (also of image files), or a Parquet file", "--dataset"
    )
    sigmas: list[NoiseLevel] = _option(
        "noise levels: standard deviations, for pixels in [0, 1]; `auto`: one classifier of two levels, which backs off to "
        "the second where the noisy copies at the first do not agree (--levels, --agreement)",
        "--sigma",
    )
    dataset_config_name: str | None = _option("configuration of the dataset (default: its only one)", default=None)
    split: str = _option("split of the dataset", default="test")
    revision: str | None = _option("revision of the model: a branch, tag or commit (default: main)", default=None)
    image_column: str | None = _option("column of the images (default: img or image)", default=None)
    label_column: str | None = _option("column of the labels (default: label, labels or fine_label)", default=None)
    every: int = _option("certify only every N-th image, starting with the first; 20 is usual for CIFAR-10", default=1)
    max_samples: int | None = _option(
        "certify no more images than this, drawn at random from the split (always the same ones): splits are often sorted "
        "by class; of a stream, the first ones (default: all)",
        default=None,
    )
    radii: list[float] | None = _option(
        "only decide whether each image reaches these radii; without them, find each image's radius (`surrogate`: needs "
        "--delta or --false-claims, and claims the largest possible one of them)",
        default=None,
    )
    method: str | None = _option(
        "how to draw noisy copies: `two-stage` plans for each image how many draws find its radius (the default without "
        "radii), `sequential` stops as soon as the radii are decided (the default with radii), `fixed` takes n0 + n draws, "
        "`surrogate` takes none and estimates with a count head, `counts` only counts the classes of n draws",
        default=None,
    )
    alpha: float = _option("largest probability that a certificate is wrong", default=0.001)
    draws: int | None = _option(
        "draws per image to plan for, on average over many images; one image takes 8 to max_draws of them (`two-stage`; "
        "default: 600)",
        default=None,
    )
    max_draws: int | None = _option(
        "largest number of draws (noisy copies) per image (default: 10,000 for `sequential`, 100,000 for `two-stage`; "
        "`fixed` takes as many, by default 100,100)",
        default=None,
    )
    n0: int | None = _option("selection draws, which choose the class (`fixed`; default: 100)", default=None)
    n: int | None = _option(
        "draws that bound the probability of this class (`fixed`; default: 100,000), or that are counted (`counts`; "
        "default: 64)",
        default=None,
    )
    seed: int | None = _option(
        "seed of the noise, to reproduce certificates (default: from the operating system, which makes alpha hold for any "
        "model and picture)",
        default=None,
    )
    dtype: Literal["float32", "bfloat16"] = _option(
        "type of the forward passes (bfloat16: autocast)", default="float32"
    )
    count_head: str | None = _option(
        "count head, on the Hub or in a local folder (default: none): guides `two-stage` and `sequential`, is required for "
        "`surrogate`",
        default=None,
    )
    levels: list[float] | None = _option(
        "the primary and the fallback noise level, for `--sigma auto` (default: 0.5 0.12); `--max-draws` holds for "
        "the certificate at each of them, and for the draws that bound the agreement",
        default=None,
    )
    agreement: float | None = _option(
        "share of the noisy copies at the primary level that must agree for their answer to count, from 0.5 to below 1; "
        "otherwise the fallback level answers (`--sigma auto`; default: 0.5)",
        default=None,
    )
    delta: float | None = _option(
        "share of images for which a calibrated count head may claim too much (`surrogate`; default: none, which makes "
        "its radii estimates)",
        default=None,
    )
    false_claims: float | None = _option(
        "share of the claims at a radius that may exceed what draws prove; a calibrated count head then claims these radii "
        "only for images where it is sure enough (`surrogate`, with --radii; default: none)",
        default=None,
    )
    noise_resolution: str = _option(
        "picture size at which noise is added, and that the radius refers to: `input` (of the network), `native` (of the "
        "picture), or a number of pixels per side",
        default="input",
    )
    denoiser: str | None = _option(
        "denoiser in front of the model: `wiener`, or a diffusion model of diffusers on the Hub (`google/ddpm-cifar10-32`, "
        "`name@revision`) or in a local folder; certificates cover both together (default: none)",
        default=None,
    )

    def __post_init__(self) -> None:
        from ..core.denoisers import check_denoiser
        from ..core.noise import GaussianNoise

        if self.method is None:
            object.__setattr__(self, "method", "two-stage" if self.radii is None else "sequential")
        check_count("every", self.every)
        if self.max_samples is not None:
            check_count("max_samples", self.max_samples)
        check_noise_resolution(self.resolution)
        check_denoiser(self.denoiser)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown: use float32 or bfloat16.")
        if self.method == "surrogate" and self.count_head is None:
            raise ValueError("method='surrogate' takes a count head: pass count_head.")
        if self.count_head is not None and self.method not in ("surrogate", "sequential", "two-stage"):
            raise ValueError(
                f"count_head={self.count_head!r} has no meaning for method {self.method!r}: leave it out."
            )
        object.__setattr__(self, "sigmas", [NoiseLevel(sigma) for sigma in self.sigmas])
        if AUTO in self.sigmas and (self.method not in ("two-stage", "fixed") or self.radii is not None):
            raise ValueError("sigma='auto' finds radii: use method two-stage or fixed, and leave radii out.")
        self._complete_levels()
        if not self.sigmas or len(set(self.sigmas)) < len(self.sigmas):
            raise ValueError(f"sigmas={self.sigmas} must be one or more different noise levels.")
        if self.seed is not None and not 0 <= self.seed < 2**63:  # records hold it as a 64-bit number
            raise ValueError(f"seed={self.seed} must be 0 or above, and below 2**63.")
        reachable = {radius for sigma in self.sigmas for radius in self.rule(sigma)[1] or ()}
        if unreachable := sorted(set(self.radii or ()) - reachable):
            self._make_rule(tuple(unreachable)).check(
                GaussianNoise(max(self.single_levels))
            )  # says how many draws it takes

    def _complete_levels(self) -> None:
        """The defaults of `levels` and `agreement` are recorded; they are None without sigma `auto`."""
        from ..core.agreement import AGREEMENT, LEVELS, check_agreement

        if AUTO not in self.sigmas:
            for name in ("levels", "agreement"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name}={value} has no meaning without sigma='auto': leave it out.")
            return
        object.__setattr__(self, "levels", list(LEVELS if self.levels is None else self.levels))
        object.__setattr__(self, "agreement", AGREEMENT if self.agreement is None else self.agreement)
        check_agreement(self.levels or (), self.agreement or 0)

    @property
    def single_levels(self) -> list[float]:
        """The noise levels that were given as numbers."""
        return [sigma for sigma in self.sigmas if sigma != AUTO]

    @property
    def smallest_radius(self) -> float:
        """The smallest radius asked for; 0 where none is."""
        return min(self.radii or (0.0,))

    @property
    def resolution(self) -> "NoiseResolution":
        """Where noise is added, as the engine takes it."""
        return parse_noise_resolution(str(self.noise_resolution))

    def rule(self, sigma: NoiseLevel) -> "tuple[Rule, tuple[float, ...] | None]":
        """
        The rule at one sigma, and the radii that it decides: those that `max_draws` can show there. With several sigmas the
        larger radii are for the larger sigmas; deciding them at a smaller one would be an error.
        """
        from ..core.agreement import ALPHA_SHARES
        from ..core.noise import GaussianNoise

        # with `auto` there are no radii, and draws that suffice at one level do so at all
        noise, radii = GaussianNoise(1.0 if sigma == AUTO else sigma), self.radii
        reachable = None if radii is None else tuple(radius for radius in radii if self._can_show(radius, noise))
        rule = self._make_rule(reachable or radii)
        rule.check(noise)
        if sigma == AUTO:
            self._make_rule(None, alpha=min(ALPHA_SHARES) * self.alpha).check(noise)
        return rule, reachable

    def _make_rule(self, radii: Sequence[float] | None, **changes: Any) -> "Rule":
        from ..core.rules import make_rule

        names = ("draws", "max_draws", "alpha", "n0", "n", "delta", "false_claims")
        options = {name: getattr(self, name) for name in names}
        return make_rule(self.method, radii=radii, calibration=self._calibration, **options | changes)

    @cached_property
    def _calibration(self) -> "Calibration | None":
        from ..core.count_predictor import read_calibration

        calibrated = self.delta is not None or self.false_claims is not None
        return read_calibration(self.count_head) if self.count_head and calibrated else None

    def _can_show(self, radius: float, noise: "GaussianNoise") -> bool:
        try:
            self._make_rule((radius,)).check(noise)
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class ExecutionSettings:
    """Settings that do not change the records of a run. They may differ when a run is resumed."""

    output_dir: str = _option("new folder for the run, or the folder of a run to resume")
    batch_size: int = _option("draws (noisy copies) per forward pass", default=128)
    streaming: bool = _option("read the dataset as a stream, without storing it", default=False)
    resume: bool = _option("resume the run in the output folder, if there is one", default=True)
    device: str | None = _option(
        "where to compute, such as `cpu` or `cuda:1` (default: a GPU if there is one)", default=None
    )
