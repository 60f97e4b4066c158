"""How commands are added, and how they fail: with one line on stderr, and an exit code."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from .. import register

Command = TypeVar("Command", bound=Callable[..., Any])

ERRORS = (KeyboardInterrupt, ImportError, OSError, RuntimeError, TypeError, ValueError)
"""The exceptions that become a message. Any other is a bug and keeps its traceback."""


def command(app: typer.Typer) -> Callable[[Command], Command]:
    """Add a function to `app` as a command that can load the models of this package, and whose errors become messages."""

    def add(function: Command) -> Command:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                register()  # imports torch and transformers, which help does not need
                function(*args, **kwargs)
            except (typer.Exit, typer.Abort):  # RuntimeErrors by kind
                raise
            except ERRORS as error:
                _print_error(error)
                raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 2) from None

        app.command()(run)
        return function

    return add


def _print_error(error: BaseException) -> None:
    # as plain text: paths and class names may hold what rich reads as markup
    if isinstance(error, KeyboardInterrupt):
        text = Text(f"\n{error}" if error.args else "\nstopped")
    else:
        text = Text("error: ", style="bold red").append(str(error), style="not bold default")
    Console(stderr=True).print(text, soft_wrap=True)
