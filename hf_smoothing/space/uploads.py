"""Files that visitors drop: pictures and tables of certificates, read within limits of size, pixels, memory and time."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, UnidentifiedImageError

from ..core.image_loading import load_image
from ..reporting.results import Result, read_results
from ..runs.records import Record

MAX_FILE_BYTES = 10 * 2**20
MAX_PIXELS = 16 * 2**20
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_ROWS = 200_000
"""Of a table, over all noise levels."""

_MEMORY = 2**30
"""Bytes that reading a table may take, see `copy_table.py`."""
_SECONDS = 30
"""Time to read a table."""


def read_picture(path: str | Path) -> Image.Image:
    """
    Read an uploaded picture in RGB.

    Raises:
        ValueError: for a file that is too large, has too many pixels (seen in its header, before anything is decoded), or is
            no picture in one of `PICTURE_FORMATS`.
    """
    path = Path(path)
    _check_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=PICTURE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"{path.name} is no picture: use a {', '.join(PICTURE_FORMATS)} file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path.name} cannot be read as a picture: {_without_folder(error, path)}") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"{path.name} has {width} x {height} pixels, more than {MAX_PIXELS:,}: make the picture smaller."
            )
        try:
            image.load()
            return load_image(image)
        except (OSError, SyntaxError, ValueError) as error:  # truncated or broken content
            raise ValueError(f"{path.name} cannot be read as a picture: {_without_folder(error, path)}") from None


def read_dropped_runs(paths: Sequence[str | Path]) -> list[Result]:
    """
    Read the tables of finished runs, and the `run.json` of each if it is there too: it says which radii were decided.

    A `run.json` belongs to the table with its seed. Tables are read in a process of their own with limited memory and time.

    Raises:
        ValueError: for a file that is too large or no such table; for a `run.json` without its table, or no table at all.
    """
    files = [Path(path) for path in paths]
    for path in files:
        _check_size(path)
    tables = [path for path in files if path.suffix == ".parquet"]
    runs = {path: _read_run(path) for path in files if path.suffix == ".json"}
    if others := [path.name for path in files if path.suffix not in (".parquet", ".json")]:
        raise ValueError(f"{others[0]} is neither a table (.parquet) nor a run.json: drop these two of each run.")
    if not tables:
        raise ValueError("There is no table: drop the certificates.parquet of a run, and its run.json.")
    results: list[Result] = []
    used: set[Path] = set()
    for number, table in enumerate(tables, 1):
        parts = _read_table(table)
        seeds = {row.get("seed") for row in parts[0].rows} - {None}
        matching = [path for path, run in runs.items() if run["settings"].get("seed") in seeds]
        run = runs[matching[0]] if matching else {}
        used.update(matching)
        name = run.get("settings", {}).get("model_name_or_path") or table.stem
        name = Path(str(name)).name if len(tables) == 1 else f"{number}: {Path(str(name)).name}"
        results += [replace(part, name=name, run=run) for part in parts]
    if unused := [path.name for path in runs if path not in used]:
        raise ValueError(f"{unused[0]} belongs to none of the tables (another seed): drop the table of its run too.")
    return results


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_FILE_BYTES // 2**20} MB.")


def _read_run(path: Path) -> Record:
    try:
        run = json.loads(path.read_bytes())
        if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
            raise ValueError("it has no settings")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no run.json: {error}.") from None
    return run


def _without_folder(error: object, path: Path) -> str:
    """The message of an error, without where the server keeps the file."""
    return str(error).replace(f"{path.parent}/", "")


def _read_table(path: Path) -> list[Result]:
    """Read a copy of the table that a process with limited memory and time makes."""
    script = Path(__file__).with_name("copy_table.py")
    with TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        arguments = [str(path), str(copy), str(_MEMORY), str(MAX_ROWS)]
        # other pools reserve addresses far beyond what they use, which the limit counts
        environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        command = [sys.executable, str(script), *arguments]
        try:
            made = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{path.name} takes longer than {_SECONDS} s to read.") from None
        if made.returncode == 1:
            raise ValueError(f"{path.name} is no table of certificates: {_without_folder(made.stderr.strip(), path)}.")
        if made.returncode:  # without memory, libraries may end the process
            raise ValueError(f"{path.name} is no table of certificates: it is too large.")
        try:
            return read_results([copy])
        except (OSError, ValueError) as error:
            raise ValueError(_without_folder(error, copy)) from None
