"""Reading finished runs: folders with `certificates.parquet`, logs of research scripts, and the pictures certified."""

import csv
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..core.certificates import ABSTAIN
from ..data.labelled_images import LabelledImages, match_labels
from ..runs.run_folder import RunFolder

Row = dict[str, Any]

COLUMNS = ("index", "label", "prediction", "radius")
"""What a table of certificates must have; every other column of a record may be missing, and is then unknown."""

LOG_COLUMNS = ("idx", "label", "predict", "radius")

NO_CERTIFICATE = "no certificate"
"""The guarantee of a run all of whose images failed: there is none to claim, and nothing unknown."""

Standing = Literal["counted", "floor", "out of reach"]
"""What the share of images at a radius is worth, see [`Result.standing`]."""


@dataclass(frozen=True)
class Result:
    """
    The certificates of one run at one noise level.

    Attributes:
        source: the folder or file, as it was named.
        name: what it is called in tables.
        rows: one record an image, as in `certificates.parquet`; an image that failed has None for its certificate.
        run: what `run.json` says; empty where there is none.
        is_log: whether this is the log of a research script, which tells less.
    """

    source: Path
    name: str
    rows: list[Row]
    run: dict[str, Any]
    is_log: bool = False

    def column(self, name: str) -> list[Any]:
        """One value an image; None where unknown."""
        return [row.get(name) for row in self.rows]

    def has(self, name: str) -> bool:
        """Whether any image has a value in this column."""
        return any(row.get(name) is not None for row in self.rows)

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was asked to do; empty where it does not say."""
        return self.run.get("settings", {})

    @property
    def model(self) -> str | None:
        """
        What tells its model from others: a digest of the weights, or else the name, and the denoiser in front of it; None
        where unknown.
        """
        found = self.settings.get("model_weights") or self.settings.get("model_name_or_path")
        return found if found is None or self.denoiser is None else f"{found} behind {self.denoiser}"

    @property
    def asked_radii(self) -> list[float]:
        """The radii asked for that the budget can show at this noise level, ascending; empty where none is named."""
        by_sigma = self.settings.get("radii_decided", {})
        return sorted(by_sigma.get(f"{self.sigma or 0:g}", self.settings.get("radii")) or [])

    @property
    def decided_radii(self) -> list[float]:
        """The radii asked for if sampling stopped once they were settled; empty if it went on to each image's radius."""
        # `fixed` makes all its draws whatever radii are asked
        return [] if self.settings.get("method") == "fixed" else self.asked_radii

    @property
    def radii_out_of_reach(self) -> list[float]:
        """The radii asked for that the budget cannot show at this noise level, ascending."""
        return sorted(set(self.settings.get("radii") or ()) - set(self.asked_radii))

    def standing(self, radius: float) -> Standing:
        """
        What the share of images at `radius` is worth.

        It is `counted` where each image's radius was found or this radius was decided; no image can have one that is `out of
        reach`; a `floor` might be higher, had the run been asked for this radius.
        """
        if not self.decided_radii or radius in self.decided_radii:
            return "counted"
        return "out of reach" if any(beyond <= radius for beyond in self.radii_out_of_reach) else "floor"

    @cached_property
    def sigma(self) -> float | None:
        return self._only("sigma")

    @cached_property
    def alpha(self) -> float | None:
        return self._only("alpha")

    @cached_property
    def noise_resolution(self) -> str:
        """To whose pixels the radii belong; runs of before there was a choice do not say."""
        return self._only("noise_resolution") or "input"

    @property
    def denoiser(self) -> str | None:
        """What was in front of the classifier, if anything."""
        return self.settings.get("denoiser") or self._only("denoiser")

    @cached_property
    def delta(self) -> float | None:
        return self._only("delta")

    @cached_property
    def norm(self) -> str | None:
        return self._only("norm")

    @cached_property
    def guarantee(self) -> str | None:
        return self._only("guarantee") if self.has("prediction") else NO_CERTIFICATE

    @property
    def title(self) -> str:
        """Name and noise level; the name alone where the level is unknown."""
        return self.name if self.sigma is None else f"{self.name}, sigma = {self.sigma:g}"

    def names(self) -> dict[int, str]:
        """Class names by class index, as far as the records have them."""
        found: dict[int, str] = {}
        for row in self.rows:
            for kind in ("label", "prediction"):
                if row[kind] is not None and row[kind] != ABSTAIN:
                    found[row[kind]] = row.get(f"{kind}_name") or str(row[kind])
        return found

    def _only(self, name: str) -> Any:
        values = sorted({row[name] for row in self.rows if row.get(name) is not None})
        if len(values) > 1:
            raise ValueError(f"{self.source} mixes {name} {', '.join(map(str, values))}: give each its own run.")
        return values[0] if values else None


def read_results(sources: Sequence[Path], log_guarantee: str | None = None) -> list[Result]:
    """
    The results in run folders, Parquet files of certificates and logs: one for each source and noise level, in order.

    Args:
        sources: folders with `certificates.parquet` (and `run.json`, if there is one), such files, or logs: tab-separated
            with the columns idx, label, predict and radius (and correct, time), -1 for an abstention.
        log_guarantee: the guarantee that the logs' certificates carry; a log does not say.

    Raises:
        FileNotFoundError: where there is no such run.
        ValueError: for a file that is no such table, or holds an image twice, or is named twice; the message names it.
    """
    tables = [(RunFolder(source).table if source.is_dir() else source).resolve() for source in sources]
    for number, source in enumerate(sources):
        if tables[number] in tables[:number]:
            raise ValueError(f"{str(source)!r} is there twice: name each run once.")
    found = []
    for source in sources:
        # two folders of the same name are told apart by their paths
        name = str(source) if sum(other.name == source.name for other in sources) > 1 else source.name or str(source)
        if source.is_dir() or source.suffix == ".parquet":
            found += _read_run(source, name)
        elif source.is_file():
            found.append(_read_log(source, name, log_guarantee))
        else:
            raise FileNotFoundError(f"There is no run folder or log at {str(source)!r}.")
    return found


def _read_run(source: Path, name: str) -> list[Result]:
    folder = RunFolder(source) if source.is_dir() else RunFolder(source.parent, table=source)
    rows = folder.read_records()
    if not rows or (missing := [column for column in COLUMNS if column not in rows[0]]):
        problem = f"lacks the columns {missing}" if rows else "has no rows"
        raise ValueError(f"{folder.table} {problem}: it holds no certificates.")
    run = folder.read_run()
    sigmas = sorted({row["sigma"] for row in rows if row.get("sigma") is not None})
    # an image that failed before any noise was added counts once at every noise level
    everywhere = list({row["index"]: row for row in rows if row.get("sigma") is None}.values()) if sigmas else rows
    found = [
        Result(source, name, [row for row in rows if row.get("sigma") == sigma] + everywhere, run) for sigma in sigmas
    ] or [Result(source, name, everywhere, run)]
    for result in found:
        _check_once(result)
    return found


def _read_log(source: Path, name: str, guarantee: str | None) -> Result:
    with source.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        header = reader.fieldnames or []
        if missing := [column for column in LOG_COLUMNS if column not in header]:
            raise ValueError(f"{source} lacks the columns {missing}: a log has them tab-separated in its first line.")
        rows = []
        for row in reader:
            try:
                if None in row or None in row.values():  # how `csv` marks what is too much, and what is missing
                    raise ValueError(f"it has not the columns {', '.join(header)}")
                rows.append(_log_row(row, guarantee))
            except ValueError as error:
                raise ValueError(f"{source}, line {reader.line_num}, is no certificate: {error}.") from None
    if not rows:
        raise ValueError(f"{source} has no certificates.")
    result = Result(source, name, rows, {}, is_log=True)
    _check_once(result)
    return result


def _log_row(row: dict[str, str], guarantee: str | None) -> Row:
    label, prediction = int(row["label"]), int(row["predict"])
    correct = row.get("correct")
    if correct is not None and int(correct) != (label == prediction):
        raise ValueError(f"correct={correct} with label {label} and prediction {prediction}")
    return {
        "index": int(row["idx"]),
        "label": label,
        "prediction": prediction,
        "radius": float(row["radius"]),
        "guarantee": guarantee,
        "norm": "l2",
        "seconds": _seconds(row["time"]) if row.get("time") else None,
    }


def _seconds(text: str) -> float:
    """Seconds in what `str(timedelta)` or a plain number says: `1 day, 0:00:17.3`, `0:00:17.3`, `17.3`."""
    days, clock = re.fullmatch(r"(?:(\d+) days?, )?(.*)", text).groups()  # type: ignore[union-attr]  # it always matches
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return 86400 * int(days or 0) + seconds


def _check_once(result: Result) -> None:
    seen = set()
    for row in result.rows:
        if row["index"] in seen:
            raise ValueError(
                f"{result.source} has image {row['index']} twice: it takes one row an image and noise level."
            )
        seen.add(row["index"])


def name_of_figure(guarantee: str | None) -> str:
    """What a share of images at a radius may be called: certified only where it is."""
    if guarantee is None:
        return "Certified accuracy as claimed (guarantee unknown)"
    if guarantee == NO_CERTIFICATE:
        return "Certified accuracy (every image failed)"
    if guarantee == "marginal":
        return "Certified accuracy (marginal guarantee: true of most images)"
    return "Estimated accuracy (not certified)" if guarantee == "none" else "Certified accuracy"


def shared_guarantee_and_norm(results: Sequence[Result]) -> tuple[str | None, str | None]:
    """
    The guarantee and the norm that results in one figure have in common. One all of whose images failed goes with any.

    Raises:
        ValueError: where they have different ones, and so make no figure.
    """
    certified = [result for result in results if result.guarantee != NO_CERTIFICATE] or list(results)
    for what in ("guarantee", "norm", "noise_resolution", "delta"):
        kinds = {str(getattr(result, what) or "unknown") for result in certified}
        if len(kinds) > 1:
            each = "; ".join(f"{result.title}: {getattr(result, what) or 'unknown'}" for result in certified)
            hint = (
                " (say with --log-guarantee what the logs carry)" if what == "guarantee" and "unknown" in kinds else ""
            )
            raise ValueError(f"Results of different {what} do not make one figure: report each alone{hint}. {each}.")
    return certified[0].guarantee, certified[0].norm


def load_pictures(
    result: Result, dataset: str, split: str | None = None
) -> tuple[list[Row], Callable[[int], Image.Image]]:
    """
    The pictures that a result is about, undecoded until they are looked at.

    Args:
        result: its images' indices are positions in the split; images that failed are left out.
        dataset: a name or folder that `load_dataset` takes, or a Parquet file.
        split: which part of it; by default the one that the run certified, or `test` where it does not say.

    Returns:
        The rows of the images that did not fail, and a call that reads the picture at a position among them.

    Raises:
        ValueError: where the dataset cannot be loaded, its columns cannot be told, or it is not the one that was certified.
    """
    images = _open(result, dataset, split or result.settings.get("split", "test"))
    rows = [row for row in result.rows if row["prediction"] is not None]
    if rows and (last := max(row["index"] for row in rows)) >= len(images.source):
        raise ValueError(
            f"{dataset} has {len(images.source)} images; {result.title} has an image {last}: not the same data."
        )
    chosen = images.source.select([row["index"] for row in rows])
    # records have the model's classes; where no run.json lists these, they are taken to be the dataset's, or what they name
    to_class = match_labels(
        images.class_names, result.settings.get("label_names") or images.class_names or _filled(result.names())
    )
    for row, label in zip(rows, chosen[images.label_column]):
        if to_class(label) != row["label"]:
            raise ValueError(
                f"{dataset} has another label for image {row['index']} than {result.title}: not the images certified."
            )
    return rows, lambda position: images.picture(chosen[position])


def _open(result: Result, dataset: str, split: str) -> LabelledImages:
    settings = result.settings
    known: dict[str, Any] = {
        "config_name": settings.get("dataset_config_name"),
        "image_column": settings.get("image_column"),
        "label_column": settings.get("label_column"),
    }
    if dataset == settings.get("dataset_name"):
        return LabelledImages(dataset, split=split, **known)
    with suppress(ValueError):
        return LabelledImages(dataset, split=split, **known)
    return LabelledImages(dataset, split=split)  # a copy may have other columns, of the usual names


def _filled(names: dict[int, str]) -> list[str]:
    return [names.get(index, str(index)) for index in range(max(names, default=-1) + 1)]
