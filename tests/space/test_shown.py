"""What the page shows, without gradio: broken claims, images and curves of runs, and HTML that holds no foreign markup."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_smoothing import ABSTAIN, GaussianNoise, SmoothedClassifier
from hf_smoothing.reporting.results import read_results
from hf_smoothing.space import breaking, markup
from hf_smoothing.space.breaking import BreakAttempt, try_to_break
from hf_smoothing.space.live_claims import LiveClaim
from hf_smoothing.space.runs_shown import EXAMPLE_RUN, draw_curves, group_images

NAMES = ["cat", "<script>alert(1)</script> ${1+1} {{value}}"]
IMAGE = torch.full((3, 4, 4), 0.5)


class Plane:
    """Differentiable: class 1 where the mean pixel is above 0.5. Its true radius is known."""

    def __call__(self, pixels):
        margin = (pixels.flatten(1).mean(1) - 0.5) * 100
        return torch.stack([-margin, margin], 1)


@pytest.fixture(scope="module")
def attempt():
    """An attack on a claim of half the true radius, which is 0.1 sqrt(48) = 0.69."""
    smoothed = SmoothedClassifier(Plane(), GaussianNoise(0.25))
    return try_to_break(smoothed, IMAGE + 0.1, 1, 0.35)


def test_an_attack_fails_inside_the_radius_and_succeeds_beyond_it(attempt):
    assert not attempt.is_broken
    assert attempt.changed_to == 0
    assert 0.69 < attempt.norm < 1.5
    assert (attempt.changed - attempt.original).norm() == pytest.approx(attempt.norm, abs=1e-5)
    assert (attempt.inside - attempt.original).norm() < 0.35
    assert attempt.inside_answer == 1


def test_a_claim_that_is_too_large_is_broken():
    smoothed = SmoothedClassifier(Plane(), GaussianNoise(0.25))
    attempt = try_to_break(smoothed, IMAGE + 0.1, 1, 1.4)
    assert attempt.is_broken
    assert "The claim is wrong" in markup.broken(attempt, NAMES)


def test_where_nothing_is_found_the_page_says_how_far_it_looked(monkeypatch):
    monkeypatch.setattr(breaking, "_EFFORT", {**breaking._EFFORT, "steps": 6, "directions": 1})
    smoothed = SmoothedClassifier(
        lambda pixels: pixels.flatten(1)[:, :2] * 0 + torch.tensor([0.0, 1.0]), GaussianNoise(0.25)
    )
    attempt = try_to_break(smoothed, IMAGE, 1, 0.1)
    assert attempt.changed is None
    assert attempt.reach == pytest.approx(0.9)
    assert "up to 0.90, and none" in markup.broken(attempt, NAMES)


def watched(radius=0.25, prediction=1, counts=(10, 90), final=False):
    claim = LiveClaim(prediction, radius, np.array(counts), IMAGE[None], np.array([1]), final)
    history, copies = ((8, 0.0), (sum(counts), radius)), ((IMAGE, 1), (IMAGE, 0))
    return markup.Watched("model", 0.25, 0.001, 10_000, NAMES, IMAGE, claim, history, copies)


def test_names_are_escaped_everywhere(attempt):
    pages = [
        markup.picker([markup.Image.new("RGB", (8, 8))], [NAMES[1]], 0),
        markup.ready(IMAGE, NAMES),
        markup.claim_card(watched(), "drawing"),
        markup.claim_card(watched(0.0, ABSTAIN, final=True), "drawing"),
        markup.copies_strip(watched()),
        markup.votes(watched()),
        markup.broken(attempt, NAMES),
        markup.notice(NAMES[1]),
    ]
    for page in pages:
        assert "<script" not in page
        assert "&lt;script&gt;" in page


def test_every_picture_has_an_alternative_text(attempt):
    for page in (markup.claim_card(watched(), ""), markup.copies_strip(watched()), markup.broken(attempt, NAMES)):
        images = re.findall(r"<img[^>]*>", page)
        assert images
        assert all(re.search(r'alt="[^"]+"', image) for image in images)


def test_radii_are_rounded_down():
    assert ">0.249<" in markup.claim_card(watched(0.2499999), "")
    assert "below 0.249 changes" in markup.claim_card(watched(0.2499999), "")


def test_an_abstention_shows_no_class_as_the_answer():
    card = markup.claim_card(watched(0.0, ABSTAIN, (51, 49), final=True), "")
    assert '<p class="hs-answer hs-muted">Abstains</p>' in card
    assert ">0.000<" in card


def test_bars_grow_with_the_votes():
    widths = [
        float(re.findall(r"width:([\d.]+)%", markup.votes(watched(counts=(0, draws))))[0]) for draws in (130, 300, 512)
    ]
    assert widths == pytest.approx([100 * 130 / 512, 100 * 300 / 512, 100], abs=0.01)


def test_the_example_run_is_about_the_images_that_ship():
    results = read_results([EXAMPLE_RUN])
    assert [result.sigma for result in results] == [0.25, 0.5]
    assert all(len(result.rows) == 200 for result in results)
    largest, smallest, abstained = group_images(results[0])
    assert [row["radius"] for row in largest.rows] == sorted((row["radius"] for row in largest.rows), reverse=True)
    assert largest.rows[0]["radius"] == max(row["radius"] for row in results[0].rows)
    assert smallest.rows[0]["radius"] == min(row["radius"] for row in results[0].rows if row["prediction"] != ABSTAIN)
    assert {row["prediction"] for row in abstained.rows} == {ABSTAIN}
    assert largest.total + abstained.total == 200
    assert markup.image_groups([largest, smallest, abstained]).count("<img") == 30


def test_images_that_are_not_there_are_an_error(tmp_path):
    result = read_results([EXAMPLE_RUN])[0]
    run = {"settings": {**result.settings, "dataset_name": str(tmp_path / "gone.parquet")}}
    with pytest.raises(ValueError, match="no Parquet file"):
        group_images(replace(result, run=run))


def test_curves_come_with_a_table_of_their_figures():
    results = read_results([EXAMPLE_RUN])
    curves = draw_curves(results)
    share = np.mean([row["prediction"] == row["label"] and row["radius"] >= 0 for row in results[0].rows])
    assert curves.shares[0][1][0] == f"{share:.1%}"
    page = markup.curves(curves)
    assert page.count("<img") == 2
    assert f"<td>{share:.1%}</td>" in page
    assert curves.shares[0][1][-1] == "out of reach"


def test_curves_of_different_images_say_so():
    first, second = read_results([EXAMPLE_RUN])
    assert draw_curves([first, second]).note == "All rows are about the same 200 images."
    assert "not about the same images" not in markup.curves(draw_curves([first, second]))
    page = markup.curves(draw_curves([first, replace(second, rows=second.rows[:50])]))
    assert "<p>The rows are not about the same images, so" in page
    assert (
        "sigma = 0.5: 50 images, 50 of them among those of example_run, sigma = 0.25 (same index and class).</p>"
        in page
    )


def test_results_of_different_alphas_make_no_curves():
    first, second = read_results([EXAMPLE_RUN])
    rows = [{**row, "alpha": 0.01} for row in second.rows]
    with pytest.raises(ValueError, match="different alpha"):
        draw_curves([first, replace(second, rows=rows)])


def test_the_folder_is_a_complete_space():
    folder = Path(EXAMPLE_RUN).parent
    text = (folder / "README.md").read_text()
    assert "sdk: gradio" in text
    assert "app_file: app.py" in text
    assert (folder / "page.png").stat().st_size < 200_000
    assert (folder / "requirements.txt").read_text() == "hf-smoothing[space]\n"


def test_an_attempt_without_a_change_is_not_broken():
    assert not BreakAttempt(1, 0.5, 3, 3, 1.5, IMAGE).is_broken
