"""Files that are either complete or not there."""

import json
import os
from pathlib import Path
from typing import Any


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
