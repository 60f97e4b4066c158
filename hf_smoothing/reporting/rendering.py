"""Text from Jinja templates: the environment and the filters that format figures."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..core.certificates import format_radius

TEMPLATES = Path(__file__).parent / "templates"


def format_number(value: float | str | None, spec: str = "g", missing: str = "unknown") -> str:
    """A number by a format specification, and what to show for None. A word in its place, such as `auto`, stays."""
    if isinstance(value, str):
        return value
    return missing if value is None else format(value, spec)


def format_percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage; `-` for None."""
    return "-" if share is None else f"{share:.{digits}%}"


def format_interval(interval: Sequence[float]) -> str:
    """The two ends of an interval of shares, as percentages."""
    low, high = interval
    return f"{low:.1%} to {high:.1%}"


def format_versions(versions: Mapping[str, str]) -> str:
    """Names and versions of packages as a list."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def format_count(number: int, noun: str) -> str:
    """A number and its noun: `1 thread`, `2 threads`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_cell(text: str) -> str:
    """Text for a cell of a Markdown table: file names may contain `|`, and a cell has one line."""
    return text.replace("|", "\\|").replace("\n", "<br>")


FILTERS = {
    "number": format_number,
    "percent": format_percent,
    "interval": format_interval,
    "radius": format_radius,
    "versions": format_versions,
    "counted": format_count,
    "cell": format_cell,
}


def render(template: str, folders: Sequence[Path] = (), **data: Any) -> str:
    """
    A template filled with data, without trailing spaces and runs of empty lines.

    Args:
        template: its name without the ending `.md.jinja`.
        folders: where to look for it and the templates it includes, besides this package's.
        data: what it shows.

    Raises:
        jinja2.UndefinedError: where the data lack something that the template names.
    """
    loader = FileSystemLoader([*folders, TEMPLATES])
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= FILTERS
    text = environment.get_template(f"{template}.md.jinja").render(data)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
