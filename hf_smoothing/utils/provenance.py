"""Where results come from: the command and the versions of the packages."""

import shlex
import sys
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("torch", "transformers", "timm", "numpy", "scipy", "hf-smoothing")


def command_line() -> str:
    """The command of this process as typed; an installed program without its folder, a script from `scripts` on."""
    program = Path(sys.argv[0])
    name = sys.argv[0] if program.suffix == ".py" else program.name
    if program.suffix == ".py" and program.is_absolute():
        start = max((place for place, part in enumerate(program.parts[:-1]) if part == "scripts"), default=-1)
        name = Path(*program.parts[start:]).as_posix()
    return shlex.join([name, *sys.argv[1:]])


def package_versions(*more: str) -> dict[str, str]:
    """Versions of the packages that results depend on, and of those named."""
    return {name: version(name) for name in (*_PACKAGES, *more)}
