"""The folder of a run, and the only reader and writer of what is in it."""

import hashlib
import json
import socket
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile

import pyarrow.parquet as pq
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..core.lattice import choose_seed
from ..utils.files import read_json, write_json
from ..utils.processes import on_main_first
from .records import (
    Record,
    ShardWriter,
    in_order_of_levels,
    is_right,
    level_of,
    read_shards,
    repair,
    shards_in,
    write_parquet,
)
from .settings import NoiseLevel

Pair = tuple[NoiseLevel, int]
"""What a record is about: the noise level asked for, and the index of the image in its split."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended; as text, what a user wants to read. An error is the noise level, the index and what is wrong."""

    path: Path
    num_records: int
    num_new: int
    errors: tuple[tuple[NoiseLevel, int, str], ...]

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
class RunState:
    """
    Where a run stands when it starts or resumes.

    Attributes:
        start: a name for this start of the run.
        seed: seed of the noise.
        image_shape: the shape that all images must have; `None` where no image can be read.
        finished: the images that have a record, and whether it is right.
    """

    start: str
    seed: int
    image_shape: tuple[int, ...] | None
    finished: dict[Pair, bool]


class RunFolder:
    """
    The folder of a run: `run.json` says what is certified and how, `shards` holds a JSON line per record while the run
    goes, and `certificates.parquet` holds all records once it is finished.

    Args:
        path: the folder. It need not exist.
        table: the Parquet file with the records; by default `certificates.parquet` in the folder.
    """

    def __init__(self, path: str | Path, table: str | Path | None = None):
        self.path = Path(path)
        self.file = self.path / "run.json"
        self.table = self.path / "certificates.parquet" if table is None else Path(table)
        self.shards = self.path / "shards"

    def read_run(self) -> Record:
        """The content of `run.json`, empty where there is none. Raises a `ValueError` where that is no JSON object."""
        return read_json(self.file) if self.file.is_file() else {}

    def read_settings(self) -> Record:
        """The settings of a finished run. Raises a `ValueError` where the run is not finished."""
        run = self.read_run()
        if "settings" not in run or not self.table.is_file() or run.get("finished", True) is None:
            raise ValueError(
                f"{self.path} holds no finished run: start one with `hf-smoothing certify-dataset`, or resume it with the "
                "command that started it."
            )
        return run["settings"]

    def read_records(self, columns: Sequence[str] | None = None) -> list[Record]:
        """
        The records of a finished run, by sigma and index; of all columns or of those named. Raises a `FileNotFoundError`
        where there is no table, a `ValueError` where it is not Parquet.
        """
        if not self.table.is_file():
            raise FileNotFoundError(f"{str(self.path)!r} has no {self.table.name}: is the run finished?")
        try:
            return pq.read_table(self.table, columns=columns).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are among them
            raise ValueError(f"{self.table} cannot be read as Parquet: {error}.") from error

    def table_digest(self) -> str:
        """The SHA-256 of the table."""
        return hashlib.sha256(self.table.read_bytes()).hexdigest()

    def check(self, resume: bool) -> None:
        """
        Check all that can be checked before dataset and model are loaded. Leaves nothing in the folder. Raises an `OSError`
        where it cannot be written to, a `ValueError` for a file, a run unless `resume`, a damaged `run.json`.
        """
        if self.path.is_file():
            raise ValueError(f"output_dir={str(self.path)!r} is a file: choose a folder.")
        try:
            TemporaryFile(dir=self._existing_folder()).close()
        except OSError as error:
            raise OSError(f"output_dir={str(self.path)!r} cannot be written to: {error.strerror}.") from error
        if self._read_started() is not None and not resume:
            raise ValueError(f"{self.path} holds a run: choose another folder, or resume it (--resume).")

    def check_shared(self, accelerator: Accelerator) -> None:
        """
        Check that all processes have the same folder: the main process leaves a file there, and the others look for it.
        Raises a `ValueError` on all processes where one does not see it: hosts may have folders of their own.
        """
        if accelerator.num_processes == 1:
            return
        path = self._existing_folder() / on_main_first(accelerator, self._leave_file)
        seen = gather_object([(accelerator.process_index, socket.gethostname(), path.is_file())])
        if accelerator.is_main_process:
            path.unlink()
        if outside := [f"process {rank} on host {host!r}" for rank, host, sees_it in seen if not sees_it]:
            raise ValueError(
                f"output_dir={str(self.path)!r} is not the same folder for all processes: what process 0 on host "
                f"{seen[0][1]!r} writes there is not seen by {', '.join(outside)}. Choose a folder on a file system that "
                "all hosts share, and write its absolute path."
            )

    def _leave_file(self) -> str:
        name = f".shared-{uuid.uuid4().hex}"
        (self._existing_folder() / name).touch()
        return name

    def _existing_folder(self) -> Path:
        """The innermost folder of the run that exists, or the innermost one around it."""
        shards = self.shards.absolute()
        return next(folder for folder in (shards, *shards.parents) if folder.exists())

    def start(self, settings: Record, session: Record, find_shape: Callable[[], tuple[int, ...] | None]) -> RunState:
        """
        Start a run in the folder or resume the one there: compare the settings, repair the shards, see what is done.

        Args:
            settings: what must be the same for a run to be resumed. Without a `seed` a new run chooses one.
            session: what is new at each start: command, versions, device, ...
            find_shape: finds the shape of the images; called if the run is new.

        Raises:
            ValueError: for a run with other settings; the message lists the differences.
        """
        self.shards.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))
        run = self._read_started()
        if settings["seed"] is None:
            settings["seed"] = choose_seed() if run is None else run["settings"]["seed"]
        if run is not None:
            _refuse_other_settings(run["settings"], settings, self.path)
        elif shards_in(self.shards):
            raise ValueError(
                f"{self.shards} holds records, but there is no {self.file} that describes them: choose another folder."
            )
        else:
            run = {"settings": settings, "image_shape": find_shape(), "command": session["command"], "sessions": []}
        for shard in shards_in(self.shards):
            repair(shard)
        radius = min(settings["radii"] or (0.0,))
        finished = {(level_of(row), row["index"]): is_right(row, radius) for row in read_shards(self.shards)}
        for interrupted in run["sessions"][-1:]:
            interrupted.setdefault("num_new", max(len(finished) - interrupted["num_before"], 0))
        run["sessions"].append({**session, "num_before": len(finished)})
        write_json({**run, "versions": _merge_versions(run["sessions"]), "finished": None}, self.file)
        shape = run["image_shape"]
        return RunState(uuid.uuid4().hex, settings["seed"], shape and tuple(shape), finished)

    def open_shard(self, rank: int) -> ShardWriter:
        """The writer of the shard of one process."""
        return ShardWriter(self.shards / f"records-rank{rank:05d}.jsonl")

    def count_records(self) -> int:
        """How many records the shards hold, without a line that is being written."""
        return sum(shard.read_bytes().count(b"\n") for shard in shards_in(self.shards))

    def finish(
        self,
        num_before: int,
        expected: int | None,
        select: Callable[[list[Record]], list[Record]] | None = None,
    ) -> RunSummary:
        """
        Merge the records of all shards into the table, and write to `run.json` that the run is finished.

        Args:
            num_before: records that were there at the start.
            expected: records that there must be, if that is known. A `RuntimeError` says that some are missing.
            select: changes records that depend on all others, before they enter the table.
        """
        rows = {(level_of(row), row["index"]): row for row in read_shards(self.shards)}
        if expected not in (None, len(rows)):
            raise RuntimeError(
                f"{len(rows)} records of {expected} are there: run the same command again to certify the rest."
            )
        write_parquet(rows.values() if select is None else select(list(rows.values())), self.table)
        in_order = sorted(rows.values(), key=in_order_of_levels)
        errors = tuple((level_of(row), row["index"], row["error"]) for row in in_order if row["error"])
        num_new = len(rows) - num_before
        run = self.read_run()
        run["sessions"][-1]["num_new"] = num_new
        run |= {
            "versions": _merge_versions(run["sessions"]),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "num_records": len(rows),
            "num_errors": len(errors),
            "process_seconds": sum(row["seconds"] for row in rows.values()),
        }
        write_json(run, self.file)
        return RunSummary(self.table, len(rows), num_new, errors)

    def _read_started(self) -> Record | None:
        """The content of `run.json` if there is one, checked for what resuming needs."""
        if not self.file.exists():
            return None
        with suppress(KeyError, ValueError):
            run = self.read_run()
            if isinstance(run["settings"], dict) and isinstance(run["sessions"], list) and "image_shape" in run:
                return run
        raise ValueError(
            f"{self.file} is damaged, and without it the records beside it mean nothing: restore it from a copy, or "
            "choose another folder."
        )


def _merge_versions(sessions: list[Record]) -> dict[str, str]:
    """The versions that the records were made with, all of them where sessions differ; a session in progress counts."""
    versions: dict[str, dict[str, None]] = {}  # dicts as ordered sets
    for session in sessions:
        if session.get("num_new") != 0:
            for package, version in session["versions"].items():
                versions.setdefault(package, {})[version] = None
    return {package: " and ".join(several) for package, several in versions.items()}


def _refuse_other_settings(before: Record, now: Record, folder: Path) -> None:
    compared = {**before, **now}
    # only one of a stream and a stored dataset has a fingerprint: nothing to compare
    if None in (before.get("dataset_fingerprint"), now.get("dataset_fingerprint")):
        compared.pop("dataset_fingerprint", None)
    differing = {
        name: f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in compared
        if before.get(name) != now.get(name)
    }
    if "dataset_fingerprint" in differing and not {"dataset_name", "dataset_config_name", "split"} & differing.keys():
        differing["dataset_fingerprint"] += " (the dataset's files were changed, copied or touched since)"
    if differing:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differing.values())}): resume it with those, or choose "
            "another folder."
        )
