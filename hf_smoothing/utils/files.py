"""Files that are either complete or not there."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises a `ValueError` where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return content


def write_json(content: Any, path: Path) -> None:
    """Write `content`, indented, to a file that is either complete or not there."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    put_in_place(part, path)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a written file to its final name, once its content is on the disk."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())  # or a power cut could leave the new name without the content
    part.replace(path)
