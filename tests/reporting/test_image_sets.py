"""Rows of one table that are about different images: told by dataset, indices and classes."""

import json

import pytest
from helpers.finished_runs import LOG, write_log, write_run
from typer.testing import CliRunner

from hf_smoothing.cli.app import app
from hf_smoothing.reporting.estimates import CompletedResult
from hf_smoothing.reporting.image_sets import group_by_images
from hf_smoothing.reporting.report import render_notes, render_report, summarize
from hf_smoothing.reporting.results import Result, read_results


def result(labels, indices=None, fingerprint=None, name="run"):
    """A result about images of these classes."""
    indices = range(len(labels)) if indices is None else indices
    rows = [
        {"index": index, "label": label, "prediction": label, "radius": 0.1} for index, label in zip(indices, labels)
    ]
    return Result(None, name, rows, {"settings": {"dataset_fingerprint": fingerprint}})


NONE = object()
"""Nothing can be said of common images: those of one index have different classes."""
MIXED, SORTED = [0, 1, 2, 1, 0, 2], [0, 0, 1, 1, 2, 2]
OTHERS = range(10, 16)


@pytest.mark.parametrize(
    ("first", "second", "groups", "in_common"),
    [
        (result(MIXED, fingerprint="a"), result(MIXED, fingerprint="a"), 1, 6),
        (result(MIXED, fingerprint="a"), result(MIXED, OTHERS, fingerprint="a"), 2, 0),  # other images of one dataset
        (result(MIXED, fingerprint="a"), result(MIXED[:4], fingerprint="a"), 2, 4),
        (result(MIXED, fingerprint="a"), result(MIXED, OTHERS, fingerprint="b"), 1, None),  # a copy, numbered anew
        (result(MIXED, fingerprint="a"), result([2, 1, 0, 1, 2, 0]), 1, 6),  # a log that numbers the classes otherwise
        (result(MIXED, fingerprint="a"), result(MIXED[2:], range(2, 6), fingerprint="b"), 2, 4),
        (result(MIXED, fingerprint="a"), result(MIXED[::-1], fingerprint="b"), 2, NONE),  # another dataset
        (result(SORTED, fingerprint="a"), result(SORTED, OTHERS, fingerprint="b"), 2, 0),
        (result(SORTED, fingerprint="a"), result(SORTED), 1, 6),
        (result(MIXED), result(MIXED[:3]), 2, 3),
    ],
)
def test_results_are_grouped_by_their_images(first, second, groups, in_common):
    found = group_by_images([first, second])
    assert len(found) == groups
    if in_common is not None:
        assert found[-1]["in_common"] == (None if in_common is NONE else in_common)


def test_a_completed_result_is_about_all_images():
    everything, sample = result(MIXED), result(MIXED[1:4], range(1, 4))
    completed = CompletedResult(None, "sample", sample.rows, {}, estimates=everything)
    assert len(group_by_images([everything, completed])) == 1
    assert len(group_by_images([everything, sample])) == 2


def test_a_report_says_which_rows_are_about_which_images(tmp_path):
    runs = [write_run(tmp_path / "a", (0.25, 0.5)), write_run(tmp_path / "b", images=30)]
    said = (
        "The rows are not about the same images, so part of their differences may come from the images. "
        "a, sigma = 0.25; a, sigma = 0.5: 60 images; b, sigma = 0.25: 30 images, 30 of them among those of a, sigma = 0.25 "
        "(same index and class)."
    )
    report = summarize(read_results(runs))
    assert said in render_notes(report)
    assert said in render_report(report)
    alone = summarize(read_results(runs[:1]))
    assert "about the same images" not in render_notes(alone)
    assert "about the same images" not in render_notes({**alone, "image_sets": []})
    done = CliRunner().invoke(app, ["report", *map(str, runs), "--output-dir", str(tmp_path / "report")])
    assert said in " ".join(done.output.split())
    assert json.loads((tmp_path / "report" / "report.json").read_text())["image_sets"] == report["image_sets"]


def test_a_report_says_that_all_rows_are_about_the_same_images(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    assert "All rows are about the same 60 images." in render_notes(summarize(read_results(runs)))


def test_radii_in_pictures_of_different_sizes_are_not_compared_without_a_word(tmp_path):
    small, large = read_results([write_run(tmp_path / "small"), write_run(tmp_path / "large")])
    for rows, dimensions in ((small.rows, 784), (large.rows, 3072)):
        for row in rows:
            row["dimensions"] = dimensions
    notes = render_notes(summarize([small, large]))
    assert "small, sigma = 0.25 to 784 pixel values; large, sigma = 0.25 to 3,072 pixel values" in notes
    assert "radii of these rows are not comparable" in notes


def test_a_log_of_other_images(tmp_path):
    log = write_log(tmp_path / "published.tsv", LOG.replace("8\t1", "4\t1"))
    notes = render_notes(summarize(read_results([write_run(tmp_path / "run"), log], "per_input", 0.001)))
    assert (
        "run, sigma = 0.25: 60 images; published.tsv: 4 images, with other classes at the same indices than run"
        in notes
    )
