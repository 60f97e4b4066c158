"""How commands are added, and how they fail: with one line on stderr, and an exit code."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from .. import register

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_CODES: dict[type[BaseException], int] = {
    KeyboardInterrupt: 130,
    ImportError: 2,
    OSError: 2,
    RuntimeError: 2,
    TypeError: 2,
    ValueError: 2,
}
"""The exceptions that become a message, and the exit codes. Any other is a bug and keeps its traceback."""


def command(app: typer.Typer) -> Callable[[Command], Command]:
    """
    Add a function to `app` as a command that can load the models of this package, and whose errors become messages.

    Args:
        app: the commands.
    """

    def add(function: Command) -> Command:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                register()  # imports torch and transformers, which help does not need
                function(*args, **kwargs)
            except (typer.Exit, typer.Abort):  # RuntimeErrors by kind
                raise
            except tuple(EXIT_CODES) as error:
                _print_error(error)
                raise typer.Exit(_exit_code(error)) from None

        app.command()(run)
        return function

    return add


def _exit_code(error: BaseException) -> int:
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def _print_error(error: BaseException) -> None:
    # as plain text: paths and class names may hold what rich reads as markup
    if isinstance(error, KeyboardInterrupt):
        text = Text(f"\n{error}" if error.args else "\nstopped")
    else:
        text = Text("error: ", style="bold red").append(str(error), style="not bold default")
    Console(stderr=True).print(text, soft_wrap=True)
