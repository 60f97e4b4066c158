"""Write the measured figures into README.md (model cards are written by `hf-smoothing card`).

A block `<!-- figures:KIND PATH -->` ... `<!-- /figures -->` holds what KIND makes of the results file at PATH (from the
root of the repository). Nothing between the two lines is written by hand.

    python scripts/update_figures.py            # fill the blocks
    python scripts/update_figures.py --check    # fail where a block differs from its results file
"""

import argparse
import json
import re
import sys
from pathlib import Path

from hf_smoothing.hub.figures import KINDS

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- figures:(\w+) (\S+) -->\n)(?:(?!<!-- figures:).)*?(<!-- /figures -->)", re.DOTALL)


def fill(text: str) -> str:
    """The text with every block filled from its results file."""

    def block(match: re.Match[str]) -> str:
        start, kind, path, end = match.groups()
        return start + KINDS[kind](json.loads((ROOT / path).read_text())) + "\n" + end

    filled, blocks = BLOCK.subn(block, text)
    if blocks != text.count("<!-- figures:"):
        raise ValueError("a figures block is not closed, or its first line is malformed")
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 where a figure is out of date"
    )
    check = parser.parse_args().check
    path = ROOT / "README.md"
    text = path.read_text()
    filled = fill(text)
    if filled == text:
        return
    if check:
        sys.exit("README.md: figures differ from their results files: run `make figures`")
    path.write_text(filled)
    print("README.md: updated")


if __name__ == "__main__":
    main()
