"""How a command fails: with one line on stderr, and exit code 2."""

from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text


def fail(error: Exception) -> NoReturn:
    """Say what is wrong and end the command."""
    # as plain text: paths and class names may hold what rich reads as markup
    said = Text("error: ", style="bold red").append(str(error), style="not bold default")
    Console(stderr=True).print(said, soft_wrap=True)
    raise typer.Exit(2)
