"""The command line of the scripts: flags from dataclasses."""

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from .progress import hide_loading_bars


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the layout of the description, and shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Values(argparse.Action):
    """The values of a flag that takes several; those of a flag that is repeated are added to the first ones."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given: Sequence[Any] = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is self.default else given), *values])


class _Parser(HfArgumentParser):
    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        if options.get("nargs") in ("+", "*"):
            options.setdefault("action", _Values)
        return super().add_argument(*names, **options)


def argument_parser(settings: tuple[Any, ...], description: str | None) -> HfArgumentParser:
    """A parser of dataclasses, whose fields become flags. The description is shown as it is."""
    hide_loading_bars()
    return _Parser(settings, description=description, formatter_class=_Help)  # type: ignore[arg-type]
