"""What the pictures of a report show."""

from contextlib import contextmanager

import pytest
from helpers.finished_runs import write_run

from hf_smoothing.reporting import plots
from hf_smoothing.reporting.plots import plot_certified_accuracy, true_class_frequency
from hf_smoothing.reporting.report import (
    summarize,
)
from hf_smoothing.reporting.results import read_results


def test_how_often_the_true_class_is_hit(tmp_path):
    (result,) = read_results([write_run(tmp_path / "run")])
    shares = true_class_frequency(result)
    assert len(shares) == 59
    assert shares[0] == result.rows[0]["counts"][0] / 200
    assert summarize([result])["results"][0]["median_counted_draws"] == 200


def test_the_same_drawing_gives_the_same_bytes(tmp_path):
    results = read_results([write_run(tmp_path / "run", (0.25, 0.5))])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plot_certified_accuracy(results, tmp_path / name / "curves", envelope="best")
    for ending in (".png", ".svg"):
        first, second = ((tmp_path / name / f"curves{ending}").read_bytes() for name in ("a", "b"))
        assert first == second


@pytest.mark.parametrize(
    "draws", [[1, 1], [2, 3], [9, 9], [60, 60], [100, 103], [10_100, 10_100], [7, 40], [20, 5000]]
)
def test_no_number_of_draws_is_written_twice_on_the_axis(tmp_path, monkeypatch, draws):
    (result,) = read_results([write_run(tmp_path / "run")])
    for position, row in enumerate(result.rows):
        row["num_samples"] = draws[position % 2]
    drawn, figure = [], plots._figure

    @contextmanager
    def keep(*arguments):
        with figure(*arguments) as axes:
            drawn.append(axes)
            yield axes

    monkeypatch.setattr(plots, "_figure", keep)
    assert plots.plot_draws([result], tmp_path / "draws")
    axis = drawn[0].xaxis
    low, high = sorted(axis.get_view_interval())
    shown = {at: text for at, text in zip(axis.get_ticklocs(), axis.get_ticklabels()) if low <= at <= high}
    texts = [text.get_text() for text in shown.values()]
    assert 2 <= len(texts) == len(set(texts)) <= 9
    assert [float(text.replace(",", "")) for text in texts] == pytest.approx(list(shown))
    assert high >= 1.5 * low
    assert low <= min(draws) <= max(draws) <= high
