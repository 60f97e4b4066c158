"""Figures in Markdown guides: blocks that are filled from results files.

A block `<!-- figures:TEMPLATE PATH ... -->` ... `<!-- /figures -->` holds what a template of `hub/templates` shows of
results files, or of the folders of several models. Paths start at the root of the repository.
"""

import os
import re
from pathlib import Path

from ..metrics.certified_accuracy import DEFAULT_THRESHOLDS
from ..reporting.rendering import render
from .model_cards import read_card
from .results_pages import TEMPLATES, render_results_file

_BLOCK = re.compile(r"(<!-- figures:(\w+) ([^\n]+?) -->\n)(?:(?!<!-- figures:).)*?(<!-- /figures -->)", re.DOTALL)


def fill_blocks(text: str, root: Path, folder: str = ".") -> str:
    """
    The text of a guide, with every block filled.

    Args:
        text: of the guide.
        root: of the repository.
        folder: of the guide, from the root; links are relative to it.

    Raises:
        ValueError: for a block that is not closed or has an unknown template, and results that cannot be read.
    """

    def fill(block: re.Match[str]) -> str:
        start, template, paths, end = block.groups()
        return start + _render_block(template, [root / path for path in paths.split()], root / folder) + end

    filled, number = _BLOCK.subn(fill, text)
    if number != text.count("<!-- figures:"):
        raise ValueError("A figures block is not closed, or its first line is malformed.")
    return filled


def _render_block(template: str, paths: list[Path], folder: Path) -> str:
    if paths[0].is_dir():
        return _compare_models(template, paths, folder)
    return render_results_file(template, *paths)


def _compare_models(template: str, models: list[Path], folder: Path) -> str:
    """A table of models, with the certified accuracy of each at the noise level with the largest share."""
    cards = [read_card(model) for model in models]
    alphas = {point["entry"]["alpha"] for card in cards for point in card.points}
    if len(alphas) > 1:
        raise ValueError(f"Models with different alphas ({alphas}) do not belong in one table.")
    rows = [
        {
            "name": card.name,
            "link": Path(os.path.relpath(model / "README.md", folder)).as_posix(),
            "tagline": card.words.tagline,
            "parameters": card.training["parameters"],
            "best": {point["radius"]: point for point in card.points},
        }
        for model, card in zip(models, cards)
    ]
    return render(template, [TEMPLATES], models=rows, radii=DEFAULT_THRESHOLDS, alphas=sorted(alphas))
