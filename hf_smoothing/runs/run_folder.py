"""The folder of a run: what it is of (`run.json`), what is done (`shards`), and the table that it becomes."""

import json
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile

import torch
from accelerate import Accelerator

from ..core.smoothing import SmoothedClassifier
from ..data.labelled_images import LabelledImages
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .records import Record, count_records, read_shards, repair, shards_in, write_parquet

Pair = tuple[float, int]
"""What a record is about: sigma, and the index of the image in its split."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended; as text, what a user wants to read."""

    path: Path
    num_records: int
    num_new: int
    errors: tuple[tuple[float, int, str], ...]

    def __str__(self) -> str:
        text = f"{self.num_records} {'record' if self.num_records == 1 else 'records'} in {self.path}"
        text += f", {self.num_new} of them new." if self.num_new else ". The run was finished already."
        if self.errors:
            indices = sorted({index for _, index, _ in self.errors})
            shown = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
            images = "1 image" if len(indices) == 1 else f"{len(indices)} images"
            text += f"\nNot certified, and counted as wrong: {images} (index {shown}). The first error: {self.errors[0][2]}"
        return text


@dataclass(frozen=True)
class Plan:
    """
    What the main process finds out for all.

    Attributes:
        start: a name for this start of the run.
        shape: the shape of the images, `None` where none can be read.
        finished: what is done.
        before: for each sigma, how many images that is, and how many of them are right.
    """

    start: str
    shape: tuple[int, ...] | None
    finished: frozenset[Pair]
    before: dict[float, tuple[int, int]]


def images_of(settings: Record) -> LabelledImages:
    """
    The images of a run.

    Args:
        settings: the run's, from its `run.json`.

    Raises:
        ValueError: where they cannot be loaded, or are no longer those of the run.
    """
    images = LabelledImages(
        settings["dataset_name"],
        config_name=settings["dataset_config_name"],
        split=settings["split"],
        image_column=settings["image_column"],
        label_column=settings["label_column"],
    )
    if settings["dataset_fingerprint"] not in (None, images.fingerprint):
        raise ValueError(
            f"{settings['dataset_name']!r} is not what the run is of: its files were changed, copied or touched since."
        )
    return images


def check_folder(output_dir: Path, resume: bool) -> None:
    """
    What can be said of a folder before dataset and model are loaded; nothing is left in it.

    Args:
        output_dir: it need not exist.
        resume: whether it may hold a run.

    Raises:
        OSError: where it cannot be written to.
        ValueError: for a file, a folder with a run if it may not hold one, a damaged `run.json`.
    """
    shards = (output_dir / "shards").absolute()
    if output_dir.is_file():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file: choose a folder.")
    try:
        with TemporaryFile(dir=next(one for one in (shards, *shards.parents) if one.exists())):
            pass
    except OSError as error:
        raise OSError(f"output_dir={str(output_dir)!r} cannot be written to: {error.strerror}.") from error
    if _read_run(output_dir) is not None and not resume:
        raise ValueError(f"{output_dir} holds a run: choose another folder, or go on with it (resume).")


def _read_run(output_dir: Path) -> Record | None:
    """What `run.json` says; `None` where there is none."""
    file = output_dir / "run.json"
    if not file.exists():
        return None
    try:
        run = json.loads(file.read_bytes())
        sound = isinstance(run["settings"], dict) and isinstance(run["sessions"], list) and "image_shape" in run
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(
            f"{file} is damaged, and without it nobody knows of what the records beside it are: put a copy of it back, or "
            "choose another folder."
        )
    return run


def prepare(output_dir: Path, identity: Record, session: Record, images: LabelledImages) -> Plan:
    """Begin a run in a folder or go on with the one there: check its settings, mend its shards, see what is done."""
    shards, file = output_dir / "shards", output_dir / "run.json"
    shards.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps(identity))
    if (run := _read_run(output_dir)) is not None:
        _refuse_other(run["settings"], identity, output_dir)
    elif shards_in(shards):
        raise ValueError(f"{shards} holds records, but there is no {file} that says of what: choose another folder.")
    else:
        run = {
            "settings": identity,
            "image_shape": images.find_shape(),
            "command": session["command"],
            "sessions": [],
        }
    for shard in shards_in(shards):
        repair(shard)
    session["num_before"] = count_records(shards)
    for last in run["sessions"][-1:]:
        if "num_new" not in last:  # it was cut short; one of an older version does not say where it began
            last["num_new"] = max(session["num_before"] - last.get("num_before", 0), 0)
    run["sessions"].append(session)
    run |= {"versions": _versions(run["sessions"]), "finished": None}
    write_json(run, file)
    smallest = min(identity["radii"] or (0.0,))
    finished = {(row["sigma"], row["index"]): is_right(row, smallest) for row in read_shards(shards)}
    done = Counter(sigma for sigma, _ in finished)
    right = Counter(sigma for (sigma, _), one in finished.items() if one)
    return Plan(
        start=uuid.uuid4().hex,
        shape=run["image_shape"] and tuple(run["image_shape"]),
        finished=frozenset(finished),
        before={sigma: (done[sigma], right[sigma]) for sigma in done},
    )


def _versions(sessions: list[Record]) -> dict[str, str]:
    """The versions that records were made with, all of them where sessions differ; a session under way counts."""
    found: dict[str, list[str]] = {}
    for session in sessions:
        if session.get("num_new") != 0:
            for name, one in session["versions"].items():
                if one not in found.setdefault(name, []):
                    found[name].append(one)
    return {name: " and ".join(several) for name, several in found.items()}


def _refuse_other(before: Record, now: Record, output_dir: Path) -> None:
    fingerprints = [one.get("dataset_fingerprint") for one in (before, now)]
    # only one of a stream and a stored dataset has a fingerprint: nothing to compare
    unknown = {"dataset_fingerprint"} if None in fingerprints else set()
    differing = {
        name: f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in {**before, **now}
        if name not in unknown and before.get(name) != now.get(name)
    }
    if "dataset_fingerprint" in differing and not {"dataset_name", "dataset_config_name", "split"} & differing.keys():
        differing["dataset_fingerprint"] += " (the dataset's files were changed, copied or touched since)"
    if differing:
        raise ValueError(
            f"{output_dir} holds a run with other settings ({'; '.join(differing.values())}): go on with those, or choose "
            "another folder."
        )


def session_of(accelerator: Accelerator, smoothed: SmoothedClassifier) -> Record:
    return {
        "command": command_line(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "device": str(accelerator.device),
        "batch_size": smoothed.batch_size,
        "versions": package_versions("datasets", "accelerate", "torchvision"),
    }


def is_right(row: Record, radius: float) -> bool:
    """Whether a record is of a right answer, certified at `radius`."""
    return row["error"] is None and row["prediction"] == row["label"] and row["radius"] >= radius


def merge(output_dir: Path, num_before: int, expected: int | None) -> RunSummary:
    """Put the records of all shards into one file, and say in `run.json` that the run is finished."""
    rows = {(row["sigma"], row["index"]): row for row in read_shards(output_dir / "shards")}
    if expected is not None and len(rows) != expected:
        raise RuntimeError(f"{len(rows)} records of {expected} are there: start the run again to certify the rest.")
    path = output_dir / "certificates.parquet"
    write_parquet(rows.values(), path)
    errors = tuple((sigma, index, row["error"]) for (sigma, index), row in sorted(rows.items()) if row["error"])
    run = json.loads((output_dir / "run.json").read_text())
    run["sessions"][-1]["num_new"] = len(rows) - num_before
    run |= {
        "versions": _versions(run["sessions"]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_records": len(rows),
        "num_errors": len(errors),
        "process_seconds": sum(row["seconds"] for row in rows.values()),
    }
    write_json(run, output_dir / "run.json")
    return RunSummary(path, len(rows), len(rows) - num_before, errors)
