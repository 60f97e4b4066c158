"""What certificates of a report rest on: guarantees and alphas that are never mixed, shares net of alpha, the sampling."""

import pytest
from helpers.finished_runs import write_log, write_run

from hf_smoothing.reporting.plots import plot_certified_accuracy
from hf_smoothing.reporting.report import best_by_radius, render_notes, render_report, summarize
from hf_smoothing.reporting.results import read_results


def test_guarantees_are_not_mixed(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", guarantee="none")]
    for sources in (folders, [folders[0], write_log(tmp_path / "log.tsv")]):
        results = read_results(sources)
        with pytest.raises(ValueError, match="do not make one figure"):
            summarize(results)
        with pytest.raises(ValueError, match="do not make one figure"):
            plot_certified_accuracy(results, tmp_path / "curves")
    assert "not certified" in render_report(summarize(read_results(folders[1:])))
    stated = summarize(read_results([folders[0], tmp_path / "log.tsv"], log_guarantee="per_input", log_alpha=0.001))
    assert "the value of --log-guarantee. Its alpha is the value of --log-alpha" in render_notes(stated)


@pytest.mark.parametrize("envelope", [False, True])
def test_alphas_are_not_mixed(tmp_path, envelope):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", alpha=0.01)]
    results = read_results(folders)
    said = "different alpha do not make one figure.* a, sigma = 0.25: 0.001; b, sigma = 0.25: 0.01"
    with pytest.raises(ValueError, match=said):
        summarize(results, envelope=envelope)
    with pytest.raises(ValueError, match=said):
        plot_certified_accuracy(results, tmp_path / "curves")
    with pytest.raises(ValueError, match=r"a, sigma = 0.25: 0.001; b, sigma = 0.25: 0.01"):
        best_by_radius([summarize([result])["results"][0] for result in results])
    log = write_log(tmp_path / "log.tsv")
    with pytest.raises(ValueError, match=r"--log-alpha states that of logs.*log.tsv: unknown"):
        summarize(read_results([folders[0], log], log_guarantee="per_input"))
    assert summarize(read_results([folders[1]]))["results"][0]["alpha"] == 0.01


def test_shares_net_of_alpha(tmp_path):
    """Three rows take a third of the 5 % each: at most 10 of 118 certificates are wrong, where for one row it is 8."""
    folders = [write_run(tmp_path / name, images=119, alpha=0.04) for name in "abc"]
    report = summarize(read_results(folders), [0, 0.25, 5], envelope=True)
    for entry in report["results"]:
        assert (entry["expected_wrong"], entry["most_wrong"]) == (pytest.approx(0.04 * 118), 10)
        for share in entry["certified_accuracy"]:
            assert share["net_of_alpha"] == max(0, share["right"] - 10) / 119
    best = report["envelope"]["certified_accuracy"]
    assert [row["net_of_alpha"] for row in best] == [
        row["net_of_alpha"] for row in report["results"][0]["certified_accuracy"]
    ]
    notes = render_notes(report)
    assert "of 118 certificates in each row, at most 4.72 are wrong on average, and at most 10 with" in notes
    assert "less 8.40 points (10/119), in the whole table" in notes
    assert summarize(read_results(folders[:1]))["results"][0]["most_wrong"] == 8
    for run in ({"guarantee": "none"}, {"guarantee": "marginal"}):
        estimated = summarize(read_results([write_run(tmp_path / run["guarantee"], **run)]))
        assert estimated["results"][0]["most_wrong"] is None
        assert "Net of alpha" not in render_notes(estimated)


def test_the_sampling_is_shown(tmp_path):
    lattice, mixed = (write_run(tmp_path / name, sampling=kinds) for name, kinds in (
        ("lattice", ["lattice"]), ("mixed", ["lattice", "float", "lattice"])
    ))  # fmt: skip
    report = summarize(read_results([mixed]))
    assert report["results"][0]["sampling"] == {"float": 20, "lattice": 39}
    assert "alpha: 0.001; sampling: float, lattice." in render_notes(report)
    assert "mixed, sigma = 0.25: 20 images got noise in floating point" in render_notes(report)
    notes = render_notes(summarize(read_results([lattice])))
    assert "; sampling: lattice." in notes
    assert "floating point" not in notes
    del report["results"][0]["sampling"]  # an old report.json
    for unknown in (report, summarize(read_results([write_run(tmp_path / "old")]))):
        assert "; sampling: unknown." in render_notes(unknown)
