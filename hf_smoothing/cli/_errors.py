"""How commands are added, what their options take, and how they fail: with one line on stderr, and an exit code."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from .. import register
from ..runs.settings import AUTO
from ..utils.errors import INTERRUPTED, USER_ERRORS
from ..utils.progress import hide_loading_bars

Command = TypeVar("Command", bound=Callable[..., Any])


def command(app: typer.Typer) -> Callable[[Command], Command]:
    """Add a function to `app` as a command that can load the models of this package, and whose errors become messages."""
    return app.command(cls=_Command)


_UNBROKEN = "\N{NON-BREAKING HYPHEN}"


class _Formatter(typer.Context.formatter_class):  # type: ignore[misc,name-defined,valid-type]
    """Help that does not break lines within names of options."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _UNBROKEN))

    def write_dl(self, rows: Sequence[tuple[str, str]], *args: Any, **options: Any) -> None:
        super().write_dl([(name, text.replace("-", _UNBROKEN)) for name, text in rows], *args, **options)

    def getvalue(self) -> str:
        return super().getvalue().replace(_UNBROKEN, "-")


class _Context(typer.Context):
    formatter_class = _Formatter


class _Command(TyperCommand):
    """A command whose list options take several values, and whose errors name its options."""

    context_class = _Context

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._repeat_flags(args)))

    def invoke(self, ctx: Any) -> Any:
        try:
            register()  # imports torch and transformers, which help does not need
            hide_loading_bars()
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors by kind
            raise
        except KeyboardInterrupt as error:
            _print_error(Text(f"\n{error}" if error.args else "\nstopped"))
            raise typer.Exit(INTERRUPTED) from None
        except USER_ERRORS as error:
            message = self._name_options(str(error))
            _print_error(Text("error: ", style="bold red").append(message, style="not bold default"))
            raise typer.Exit(2) from None

    def _repeat_flags(self, args: Sequence[str]) -> Iterator[str]:
        """`--radii 0 --radii 0.5` for `--radii 0 0.5`, as the scripts take them."""
        lists = {flag for option in self.params if getattr(option, "multiple", False) for flag in option.opts}
        flag, has_value = None, True
        for word in args:
            if flag is not None and (_is_number(word) or word == AUTO):
                yield from (flag, word)
                has_value = True
                continue
            if not has_value and flag is not None:
                yield flag  # without its value: an error of the parser
            flag = word if word.replace("_", "-") in lists else None
            has_value = flag is None
            if flag is None:
                yield word
        if not has_value and flag is not None:
            yield flag

    def _name_options(self, text: str) -> str:
        """An error message with `--count-head` for `count_head`: messages name settings as Python spells them."""
        for option in self.params:
            flag = max(option.opts, key=len)
            if flag.startswith("--"):
                ending = r"(?!\w|/|\.\w)" if "_" in str(option.name) else "(?==)"
                text = re.sub(rf"(?<![\w/.'\"`-]){re.escape(str(option.name))}{ending}", flag, text)
        return text


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _print_error(text: Text) -> None:
    # as plain text: paths and class names may hold what rich reads as markup
    Console(stderr=True).print(text, soft_wrap=True)
