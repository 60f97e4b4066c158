"""Write the measured figures into the Markdown guides (`hf-smoothing card` writes those of model cards).

python scripts/update_figures.py            # fill the blocks <!-- figures:TEMPLATE PATH ... -->
python scripts/update_figures.py --check    # fail if a block differs from its results files
"""

import argparse
import sys
from pathlib import Path

from hf_smoothing.hub.figure_blocks import fill_blocks

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ("README.md", "hf_smoothing/README.md", "model_cards/README.md", "scripts/README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if figures are out of date")
    check = parser.parse_args().check
    outdated = []
    for guide in filter(Path.is_file, (ROOT / name for name in GUIDES)):
        text = guide.read_text(encoding="utf-8")
        filled = fill_blocks(text, ROOT, str(guide.parent.relative_to(ROOT)))
        if filled != text:
            outdated.append(str(guide.relative_to(ROOT)))
            if not check:
                guide.write_text(filled, encoding="utf-8")
    if outdated and check:
        sys.exit(f"{', '.join(outdated)}: figures differ from their results files: run `make figures`")
    print(*(f"{guide}: updated" for guide in outdated), sep="\n", end="\n" * bool(outdated))


if __name__ == "__main__":
    main()
