"""Logs in the format of Cohen et al. that this package writes: read again, they hold the certificates of the run."""

import json

import pytest
from helpers.finished_runs import rows, write_log, write_run
from typer.testing import CliRunner

from hf_smoothing.cli.app import app
from hf_smoothing.reporting import research_logs
from hf_smoothing.reporting.report import summarize, write_report
from hf_smoothing.reporting.results import read_results


def test_a_run_written_as_logs_is_read_again(tmp_path):
    # the name of the folder has a sigma of its own
    run = write_run(tmp_path / "sigma-0.5 finetuned", (0.12, 0.25))
    options = ["--write-logs", "--output-dir", str(tmp_path / "report")]
    done = CliRunner().invoke(app, ["report", str(run), *options])
    assert done.exit_code == 0, done.output
    names = [f"sigma-0.5-finetuned-sigma_{sigma}.log" for sigma in (0.12, 0.25)]
    assert json.loads((tmp_path / "report" / "report.json").read_text())["logs"] == names
    assert f"report.json, {', '.join(names)} and the pictures" in done.output
    paths = [tmp_path / "report" / name for name in names]
    header = paths[0].read_text().splitlines()[0]
    assert header == "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    before, after = read_results([run]), read_results(paths, "per_input", 0.001)
    radii = [0.0, 0.1, 0.2]
    for entry, again in zip(summarize(before, radii)["results"], summarize(after, radii)["results"], strict=True):
        for name in ("sigma", "certified_accuracy", "mean_certified_radius", "mean_seconds"):
            if name != "certified_accuracy":
                assert again[name] == entry[name]
                continue
            shown = [[row["right"] for row in figures[name]] for figures in (entry, again)]
            assert shown[0] == shown[1]
    for result, again in zip(before, after, strict=True):
        for row, other in zip(result.rows, again.rows, strict=True):
            failed = row["prediction"] is None
            assert (other["prediction"], other["radius"]) == (
                (-1, 0.0) if failed else (row["prediction"], row["radius"])
            )
            assert [other[name] for name in ("index", "label", "seconds")] == [
                row[name] for name in ("index", "label", "seconds")
            ]


def test_only_runs_are_written_and_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / name / "run") for name in ("a", "b") if (tmp_path / name).mkdir() is None]
    log = write_log(tmp_path / "published_sigma_0.25.log")
    report, folder = write_report(
        [*(run.relative_to(tmp_path) for run in runs), log],
        log_guarantee="per_input",
        log_alpha=0.001,
        write_logs=True,
    )
    assert report["logs"] == ["a-run-sigma_0.25.log", "b-run-sigma_0.25.log"]
    assert sorted(path.name for path in folder.glob("*.log")) == report["logs"]
    report, folder = write_report([runs[0]], tmp_path / "without")
    assert report["logs"] == list(folder.glob("*.log")) == []


def test_radii_of_another_norm_are_refused(tmp_path):
    records = [row | {"norm": "l1"} for row in rows(write_run(tmp_path / "run"))]
    with pytest.raises(ValueError, match="Image 0 has a radius in the norm 'l1': logs hold l2 radii"):
        research_logs.write_log(records, tmp_path / "run.log")
