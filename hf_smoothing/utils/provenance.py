"""Where results come from: what was typed, and with which versions."""

import shlex
import sys
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("torch", "transformers", "timm", "numpy", "scipy", "hf-smoothing")


def command_line() -> str:
    """The command of this process as typed, but for an absolute path of the program: that would be of this machine alone."""
    program = Path(sys.argv[0])
    return shlex.join([program.name if program.is_absolute() else sys.argv[0], *sys.argv[1:]])


def package_versions(*more: str) -> dict[str, str]:
    """Versions of the packages that decide what comes out, and of those named besides."""
    return {name: version(name) for name in (*_PACKAGES, *more)}
