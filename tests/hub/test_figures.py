"""The figures in the text are those of the results files."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import update_figures  # noqa: E402


def test_blocks_are_filled_and_the_text_between_them_stays(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text('{"share": 5}')
    monkeypatch.setattr(update_figures, "ROOT", tmp_path)
    monkeypatch.setitem(update_figures.KINDS, "share", lambda results: f"share {results['share']}")
    empty = "a\n<!-- figures:share results.json -->\n<!-- /figures -->\n"
    text = empty + "between\n" + empty.replace("-->\n<!--", "-->\nold\n<!--") + "after\n"
    filled = update_figures.fill(text)
    assert filled.count("share 5\n<!-- /figures -->") == 2
    assert "between" in filled
    assert "old" not in filled
    assert update_figures.fill(filled) == filled
    with pytest.raises(ValueError, match="not closed"):
        update_figures.fill("<!-- figures:share results.json -->\n")


def test_the_figures_of_the_readme_are_the_measured_ones():
    text = (ROOT / "README.md").read_text()
    assert update_figures.fill(text) == text
    assert "<!-- figures:" in text
