"""The figures in Markdown guides are those of the results files."""

import json

import pytest
from helpers.paths import ROOT

from hf_smoothing.hub.figure_blocks import fill_blocks

GUIDES = [path for path in (ROOT / name for name in ("README.md", "model_cards/README.md")) if path.is_file()]
SPEED = {
    "images_per_second": 196.0, "ratio": 0.967, "ratios": [0.91, 1.02], "ratio_interval_95": [0.954, 0.981],
    "parameters": 1000, "device": "cpu", "num_threads": 1, "command": "benchmark", "versions": {"torch": "2"},
}  # fmt: skip


def test_blocks_are_filled_and_the_text_between_them_stays(tmp_path):
    (tmp_path / "speed.json").write_text(json.dumps(SPEED))
    empty = "a\n<!-- figures:training_speed speed.json -->\n<!-- /figures -->\n"
    text = empty + "between\n" + empty.replace("-->\n<!--", "-->\nold\n<!--") + "after\n"
    filled = fill_blocks(text, tmp_path)
    assert filled.count("196 images per second") == 2
    assert "between" in filled
    assert "old" not in filled
    assert fill_blocks(filled, tmp_path) == filled
    (tmp_path / "speed.json").write_text(json.dumps({**SPEED, "images_per_second": 197.0}))
    assert fill_blocks(filled, tmp_path) != filled
    with pytest.raises(ValueError, match="not closed"):
        fill_blocks("<!-- figures:training_speed speed.json -->\n", tmp_path)


def test_models_side_by_side():
    block = "<!-- figures:model_comparison model_cards/mixed-noise-vit-nano-{} model_cards/mixed-noise-vit-nano-{} -->"
    text = fill_blocks(block.format("cifar10", "cifar10-counts") + "\n<!-- /figures -->\n", ROOT, "model_cards")
    results = ROOT / "model_cards" / "mixed-noise-vit-nano-cifar10" / "results"
    report = json.loads((results / "cifar10" / "report" / "report.json").read_text())
    best = max(report["results"], key=lambda entry: entry["certified_accuracy"][3]["share"] or 0)
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    assert "(mixed-noise-vit-nano-cifar10/README.md)" in lines[0]  # relative to the guide
    assert f"{best['certified_accuracy'][3]['share']:.1%} ({best['sigma']:g})" in lines[0]
    assert "%" not in lines[1]  # the head certifies nothing


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_the_figures_of_the_guides_are_the_measured_ones(guide):
    text = guide.read_text()
    assert fill_blocks(text, ROOT, str(guide.parent.relative_to(ROOT))) == text
    assert "<!-- figures:" in text
