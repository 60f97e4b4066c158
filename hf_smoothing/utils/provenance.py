"""Where results come from: the command and the versions of the packages."""

import shlex
import sys
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("torch", "transformers", "timm", "numpy", "scipy", "hf-smoothing")


def command_line() -> str:
    """The command of this process as typed; an installed program without its folder."""
    program = Path(sys.argv[0])
    return shlex.join(
        [program.name if program.suffix != ".py" or program.is_absolute() else sys.argv[0], *sys.argv[1:]]
    )


def package_versions(*more: str) -> dict[str, str]:
    """Versions of the packages that results depend on, and of those named."""
    return {name: version(name) for name in (*_PACKAGES, *more)}
