"""Where results come from: the command and the versions of the packages."""

import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("torch", "transformers", "timm", "numpy", "scipy", "hf-smoothing")


def command_line() -> str:
    """
    The command of this process, without folders of this machine: a script from `scripts` on, an installed program and
    absolute paths by their names. All other words are as typed.
    """
    program = Path(sys.argv[0])
    name = program.name
    if program.suffix == ".py":
        parts = program.absolute().parts
        start = max((place for place, part in enumerate(parts[:-1]) if part == "scripts"), default=-1)
        name = Path(*parts[start:]).as_posix()
    # an absolute path is a word, or a part of one between `=` and `,`
    return shlex.join([name, *(re.sub(r"(^|[=,])[/~][^=,]*/(?=[^/=,])", r"\1", word) for word in sys.argv[1:])])


def package_versions(*more: str) -> dict[str, str]:
    """Versions of the packages that results depend on, and of those named."""
    return {name: version(name) for name in (*_PACKAGES, *more)}
