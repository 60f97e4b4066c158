"""Tables on a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_NUMBERS = ("radius", "passes")
"""Right-aligned columns."""

_BETWEEN = 3
"""Characters between the texts of two columns: a space on each side of a rule."""


def print_table(console: Console, title: str, rows: Sequence[dict[str, Any]], keys: int = 1) -> None:
    """
    Print rows, each a dict with the same columns, as one table, or on a narrow terminal as several below each other.

    Only cells of the first column wrap: names of several words, and those wider than a third of the terminal.

    Args:
        console: where to print.
        title: one line above.
        rows: at least one.
        keys: number of leading columns that identify a row; each table repeats them.
    """
    columns = list(rows[0])
    texts = {name: [name, *(str(row[name]) for row in rows)] for name in columns}
    widths = {name: max(len(line) for text in texts[name] for line in text.splitlines() or [""]) for name in columns}
    longest = max(len(word) for text in texts[columns[0]] for word in text.split())
    widths[columns[0]] = min(longest, console.width // 3)
    room = console.width - 1 - sum(widths[name] + _BETWEEN for name in columns[:keys])
    parts: list[list[str]] = [[]]
    for name in columns[keys:]:
        if parts[-1] and sum(widths[column] + _BETWEEN for column in [*parts[-1], name]) > room:
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
