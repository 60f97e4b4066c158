"""Tables on a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_NUMBERS = ("radius", "draws")
"""Columns that are set to the right."""

_BETWEEN = 3
"""Cells between the texts of two columns: a blank on either side of a rule."""


def print_table(console: Console, title: str, rows: Sequence[dict[str, Any]], keys: int = 1) -> None:
    """
    Print rows, each a dict with the same columns, as one table, or as several below each other where the terminal is narrow.

    No cell is broken into more lines than it has, but for names of several words or beyond a third of the terminal's width.

    Args:
        console: where to print.
        title: one line above.
        rows: at least one.
        keys: so many columns, from the first on, say what a row is about: each table has them.
    """
    columns = list(rows[0])
    texts = {name: [name, *(str(row[name]) for row in rows)] for name in columns}
    widths = {name: max(len(line) for text in texts[name] for line in text.splitlines() or [""]) for name in columns}
    longest = max(len(word) for text in texts[columns[0]] for word in text.split())
    widths[columns[0]] = min(longest, console.width // 3)
    room = console.width - 1 - sum(widths[name] + _BETWEEN for name in columns[:keys])
    parts: list[list[str]] = [[]]
    for name in columns[keys:]:
        if parts[-1] and sum(widths[one] + _BETWEEN for one in [*parts[-1], name]) > room:
            parts.append([])
        parts[-1].append(name)
    for part in parts:
        console.print(_table(title if part is parts[0] else None, columns[:keys] + part, widths, rows))


def _table(title: str | None, columns: Sequence[str], widths: dict[str, int], rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(
            name,
            justify="right" if name in _NUMBERS else "left",
            min_width=widths[name],
            no_wrap=number > 0,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(str(row[name])) for name in columns))
    return table
