"""The certificates of finished runs, from run folders, Parquet files and logs."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..core.agreement import ALPHA_SHARES
from ..core.certificates import ABSTAIN, format_radius
from ..core.fixed_rule import FixedRule
from ..core.noise import GaussianNoise
from ..core.rules import RULES, make_rule
from ..core.sequential_rule import SequentialRule
from ..runs.records import in_order_of_levels, level_of
from ..runs.run_folder import RunFolder
from ..runs.settings import AUTO, NoiseLevel
from .rendering import format_number
from .research_logs import Row, read_log

COLUMNS = ("index", "label", "prediction", "radius")
"""The columns that a table of certificates must have. Every other column may be missing, and is then unknown."""

NO_CERTIFICATE = "no certificate"
"""The guarantee of a run in which every image failed."""

Standing = Literal["counted", "floor", "out of reach"]
"""How the share of images at a radius was found, see [`Result.standing`]."""


@dataclass(frozen=True)
class Result:
    """
    The certificates of one run at one noise level, or of one classifier of two levels (sigma `auto`).

    Attributes:
        source: the folder or file.
        name: its name in tables.
        rows: one record per image, as in `certificates.parquet`; an image that failed has None for its certificate.
        run: the content of `run.json`; empty where there is none.
        is_log: whether this is the log of a research script.
    """

    source: Path
    name: str
    rows: list[Row]
    run: dict[str, Any]
    is_log: bool = False

    @property
    def labels(self) -> dict[int, int]:
        """The class of each image that the result is about, by its index."""
        return dict(zip(self.column("index"), self.column("label")))

    def column(self, name: str) -> list[Any]:
        """One value per image; None where unknown."""
        return [row.get(name) for row in self.rows]

    def has(self, name: str) -> bool:
        """Whether any image has a value in this column."""
        return any(row.get(name) is not None for row in self.rows)

    def optional_columns(self) -> dict[str, str]:
        """The optional columns of `certified_accuracy` that the table has, and their names in it."""
        names = {"p_lower": "p_lower", "num_samples": "num_samples", "guarantees": "guarantee", "alphas": "alpha"}
        if not self.decided_radii:  # sampling that decides radii stops at them, though all draws agree
            names["counts"] = "counts"
        return {name: column for name, column in names.items() if self.has(column)}

    def metric_columns(self) -> dict[str, Any]:
        """The columns of `certified_accuracy`."""
        names = {"predictions": "prediction", "references": "label", "radii": "radius", **self.optional_columns()}
        columns = {name: self.column(column) for name, column in names.items()}
        if "counts" in columns:
            columns["counts"] = [row["counts"] if _rests_on_counts(row) else None for row in self.rows]
        return columns

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run; empty where unknown."""
        return self.run.get("settings", {})

    @property
    def model(self) -> str | None:
        """What identifies the model: a digest of the weights, or else the name, and the denoiser; None where unknown."""
        model = self.settings.get("model_weights") or self.settings.get("model_name_or_path")
        return model if model is None or self.denoiser is None else f"{self.denoiser} and {model}"

    @property
    def asked_radii(self) -> list[float]:
        """The radii of the settings that the budget can show at this noise level, ascending; empty without such radii."""
        by_sigma = self.settings.get("radii_decided", {})
        sigma = self.sigma if self.sigma == AUTO else f"{self.sigma or 0:g}"
        return sorted(by_sigma.get(sigma, self.settings.get("radii")) or [])

    @property
    def decided_radii(self) -> list[float]:
        """The radii at which sampling stopped once they were decided; empty where each image's radius was found."""
        # `fixed` makes all its draws, whatever the radii
        return [] if self.settings.get("method") == "fixed" else self.asked_radii

    @property
    def radii_out_of_reach(self) -> list[float]:
        """The radii of the settings that the budget cannot show at this noise level, ascending."""
        return sorted(set(self.settings.get("radii") or ()) - set(self.asked_radii))

    @cached_property
    def largest_radius(self) -> float | None:
        """The largest radius that the draws can prove, whatever the image; None where the run's settings do not say."""
        if self.decided_radii:
            return self.decided_radii[-1] if self.radii_out_of_reach else None
        names = ("alpha", "draws", "max_draws", "n0", "n")
        settings = {name: self.settings[name] for name in names if self.settings.get(name) is not None}
        method = self.settings.get("method")
        unknown = self.sigma is None or self.delta is not None or method not in RULES
        if unknown or "alpha" not in settings:
            return None
        # the radius of two levels is at most that of the certificate at one of them
        levels = zip(self.settings["levels"], ALPHA_SHARES) if self.sigma == AUTO else [(self.sigma, 1.0)]
        return max(
            make_rule(method, **settings | {"alpha": share * settings["alpha"]}).largest_radius(GaussianNoise(sigma))
            for sigma, share in levels
        )

    @cached_property
    def unanimous_radii(self) -> list[float]:
        """
        The radii of the right images whose counted draws all agree. They are the largest that these draws prove, and further
        draws would prove larger ones. Empty where radii were decided: there sampling stops for another reason.
        """
        if self.decided_radii:
            return []
        right = [row for row in self.rows if row.get("prediction") == row["label"] and _rests_on_counts(row)]
        return [row["radius"] for row in right if row["counts"][row["label"]] == sum(row["counts"]) > 0]

    def standing(self, radius: float) -> Standing:
        """
        How the share of images at `radius` was found.

        `counted`: each image's radius was found, or this radius was decided. `out of reach`: the draws cannot prove this
        radius for any image, so there is no share. `floor`: the share is a lower bound, because the run did not decide this
        radius. Where radii are found, [`certified_accuracy`] also sees from the counts which images had too few draws.
        """
        if not self.decided_radii:
            return "out of reach" if radius > (self.largest_radius or math.inf) else "counted"
        if radius in self.decided_radii:
            return "counted"
        beyond = any(largest <= radius for largest in self.radii_out_of_reach) or not self._could_decide(radius)
        return "out of reach" if beyond else "floor"

    def _could_decide(self, radius: float) -> bool:
        """Whether the draws could have proved a radius that the run was not asked for; True where that is unknown."""
        settings = self.settings
        known = settings.get("alpha") is not None and settings.get("max_draws") is not None
        if settings.get("method") != SequentialRule.method or not known or not isinstance(self.sigma, float):
            return True
        noise = GaussianNoise(self.sigma)
        if noise.probability_needed(radius) >= 1:
            return False
        rule = SequentialRule((radius,), alpha=settings["alpha"], max_draws=settings["max_draws"])
        return rule.largest_radius(noise) >= radius

    @cached_property
    def sigma(self) -> NoiseLevel:
        """The noise level, which may be `"auto"`; None where unknown."""
        return AUTO if any(level_of(row) == AUTO for row in self.rows) else self._only("sigma")

    @cached_property
    def alpha(self) -> float | None:
        return self._only("alpha")

    @cached_property
    def sampling(self) -> dict[str, int]:
        """How many images got noise on the `lattice` and in `float`, see [`Certificate`]; empty where unknown."""
        return dict(sorted(Counter(value for value in self.column("sampling") if value).items()))

    @cached_property
    def noise_resolution(self) -> str:
        """The resolution whose pixels the radii belong to. Old runs do not name it: theirs is the input's."""
        return self._only("noise_resolution") or "input"

    @cached_property
    def dimensions(self) -> int | None:
        """The number of pixel values that get noise; None where unknown, or where pictures differ in size."""
        values = {row["dimensions"] for row in self.rows if row.get("dimensions") is not None}
        return values.pop() if len(values) == 1 else None

    @property
    def denoiser(self) -> str | None:
        """The denoiser before the classifier, if any."""
        return self.settings.get("denoiser") or self._only("denoiser")

    @cached_property
    def delta(self) -> float | None:
        return self._only("delta")

    @cached_property
    def false_claims(self) -> float | None:
        return self._only("false_claims")

    @cached_property
    def norm(self) -> str | None:
        return self._only("norm")

    @cached_property
    def guarantee(self) -> str | None:
        return self._only("guarantee") if self.has("prediction") else NO_CERTIFICATE

    @property
    def title(self) -> str:
        """Name and noise level; the name alone where the level is unknown."""
        return self.name if self.sigma is None else f"{self.name}, sigma = {format_number(self.sigma)}"

    def class_names(self) -> list[str]:
        """Class names, as far as the records have them; an index where they do not."""
        kinds = ("label", "prediction")
        names = {row[kind]: row.get(f"{kind}_name") or str(row[kind]) for row in self.rows for kind in kinds}
        names = {index: name for index, name in names.items() if index not in (None, ABSTAIN)}
        return [names.get(index, str(index)) for index in range(max(names, default=-1) + 1)]

    def _only(self, name: str) -> Any:
        values = sorted({row[name] for row in self.rows if row.get(name) is not None})
        if len(values) > 1:
            raise ValueError(f"{self.source} mixes {name} {', '.join(map(str, values))}: a run has one.")
        return values[0] if values else None


def _rests_on_counts(row: Row) -> bool:
    """Whether the counts bound the radius alone: where a fallback level is in use, the primary level bounds it too."""
    choice = row.get("level_choice")
    return bool(row.get("counts")) and (choice is None or row["sigma"] == choice["levels"][0])


def read_results(
    sources: Sequence[Path],
    log_guarantee: str | None = None,
    log_alpha: float | None = None,
    log_n: Sequence[int] = (),
) -> list[Result]:
    """
    Read run folders, Parquet files of certificates and logs: one result per source and noise level, in order.

    Args:
        sources: folders with `certificates.parquet` (and maybe `run.json`), such files, or logs, see [`read_log`].
        log_guarantee: the guarantee of the certificates in logs; a log does not say.
        log_alpha: their alpha; a log does not say either.
        log_n: the counted draws of each image in logs, from which the largest radius follows that they can prove: one number
            for all logs, or one for each; none where unknown.

    Raises:
        FileNotFoundError: for a source that does not exist.
        ValueError: for a file without certificates or with an image twice, a source that is given twice, and a `log_n` that
            proves no radius or smaller ones than a log has, or has another length than the logs.
    """
    tables = [(RunFolder(source).table if source.is_dir() else source).resolve() for source in sources]
    results: list[Result] = []
    draws_of_logs = _draws_of_logs([source for source in sources if _is_log(source)], log_n)
    for number, source in enumerate(sources):
        if tables[number] in tables[:number]:
            raise ValueError(f"{str(source)!r} is given twice: name each run once.")
        # two folders of the same name are told apart by their paths
        name = str(source) if sum(other.name == source.name for other in sources) > 1 else source.name or str(source)
        if source.is_dir() or source.suffix == ".parquet":
            results += _read_run(source, name)
        elif _is_log(source):
            results.append(_read_log(source, name, log_guarantee, log_alpha, draws_of_logs[source]))
        else:
            raise FileNotFoundError(f"There is no run folder or log at {str(source)!r}.")
    for result in results:
        if twice := [index for index, number in Counter(result.column("index")).items() if number > 1]:
            raise ValueError(
                f"{result.source} has image {twice[0]} twice: a table has one row per image and noise level."
            )
    return results


def _is_log(source: Path) -> bool:
    return source.is_file() and source.suffix != ".parquet"


def _draws_of_logs(logs: Sequence[Path], log_n: Sequence[int]) -> dict[Path, int | None]:
    """The counted draws of the images in each log, None where unknown."""
    if len(log_n) not in (0, 1, len(logs)):
        raise ValueError(f"log_n has {len(log_n)} numbers for {len(logs)} logs: give one for all, or one for each.")
    return dict(zip(logs, log_n if len(log_n) == len(logs) else [*log_n, None][:1] * len(logs)))


_LOG_PRECISION = 0.005
"""Research scripts print three digits: the largest relative error of a rounded radius."""


def _read_log(source: Path, name: str, guarantee: str | None, alpha: float | None, n: int | None) -> Result:
    rows = read_log(source, guarantee, alpha)
    if n is None:
        return Result(source, name, rows, {}, is_log=True)
    if alpha is None or rows[0]["sigma"] is None:
        raise ValueError(
            f"{source}: log_n={n} tells which radii are out of reach only together with alpha and sigma. Give log_alpha "
            "(--log-alpha), and a name like my-log-sigma_0.25.tsv to the file: a log does not contain its sigma."
        )
    settings = {"method": FixedRule.method, "n": n, "alpha": alpha}
    result = Result(source, name, rows, {"settings": settings}, is_log=True)
    farthest, reach = max(rows, key=lambda row: row["radius"]), result.largest_radius or 0.0
    if farthest["radius"] > reach * (1 + _LOG_PRECISION):
        raise ValueError(
            f"{source}: log_n={n} draws prove at most radius {format_radius(max(reach, 0.0))} at sigma "
            f"{farthest['sigma']:g} and alpha {alpha:g}, but image {farthest['index']} has {farthest['radius']:g}. Give "
            "the number of draws that were counted for each image."
        )
    return result


def _read_run(source: Path, name: str) -> list[Result]:
    folder = RunFolder(source) if source.is_dir() else RunFolder(source.parent, table=source)
    rows = folder.read_records()
    if not rows or (missing := [column for column in COLUMNS if column not in rows[0]]):
        problem = f"lacks the columns {missing}" if rows else "has no rows"
        raise ValueError(f"{folder.table} {problem}: it holds no certificates.")
    run = folder.read_run()
    levels = {level_of(row): None for row in sorted(rows, key=in_order_of_levels) if level_of(row) is not None}
    if not levels:
        return [Result(source, name, rows, run)]
    # an image that failed before any noise was added counts once at every noise level
    everywhere = list({row["index"]: row for row in rows if level_of(row) is None}.values())
    return [
        Result(source, name, [row for row in rows if level_of(row) == level] + everywhere, run) for level in levels
    ]


def name_of_figure(guarantee: str | None) -> str:
    """The name of a share of images at a radius: certified accuracy only where it is certified."""
    notes = {
        None: " as claimed (guarantee unknown)",
        NO_CERTIFICATE: " (every image failed)",
        "marginal": " (marginal guarantee: holds for images on average)",
        "selected": " (selected guarantee: most claims hold on average)",
    }
    return (
        "Estimated accuracy (not certified)"
        if guarantee == "none"
        else "Certified accuracy" + notes.get(guarantee, "")
    )


def shared_guarantee_and_norm(results: Sequence[Result]) -> tuple[str | None, str | None]:
    """
    The guarantee and the norm that results in one figure share. A result in which every image failed goes with any.

    Raises:
        ValueError: for results that differ in guarantee, alpha, norm, noise resolution or delta: they make no one figure.
    """
    certified = [result for result in results if result.guarantee != NO_CERTIFICATE] or list(results)
    for name in ("guarantee", "alpha", "norm", "noise_resolution", "delta", "false_claims"):
        values = {str(getattr(result, name) or "unknown") for result in certified}
        if len(values) > 1:
            each = "; ".join(f"{result.title}: {getattr(result, name) or 'unknown'}" for result in certified)
            stated = name in ("guarantee", "alpha") and "unknown" in values
            hint = f" (--log-{name} states that of logs)" if stated else ""
            raise ValueError(f"Results of different {name} do not make one figure: report each alone{hint}. {each}.")
    return certified[0].guarantee, certified[0].norm
