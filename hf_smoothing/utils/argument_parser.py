"""The command line of the scripts: flags from dataclasses, and errors as messages."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the layout of the description, and shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def argument_parser(settings: tuple[Any, ...], description: str | None) -> HfArgumentParser:
    """A parser of dataclasses, whose fields become flags. The description is shown as it is."""
    return HfArgumentParser(settings, description=description, formatter_class=_Help)  # type: ignore[arg-type]


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the program with a message, and exit status 1, for errors that its user can fix."""
    try:
        yield
    except (OSError, ValueError, FloatingPointError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
