"""Radii that the draws cannot prove: nothing is measured there, and tables, notes, curves and the metric say so."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.finished_runs import LOG, write_log, write_run
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from hf_smoothing import CertifiedAccuracy, FixedRule, GaussianNoise, SequentialRule, TwoStageRule
from hf_smoothing.cli.app import app
from hf_smoothing.core.agreement import ALPHA_SHARES
from hf_smoothing.core.count_rule import CountRule
from hf_smoothing.metrics.certified_accuracy import certified_accuracy
from hf_smoothing.reporting.plots import draw_certified_accuracy, plot_certified_accuracy
from hf_smoothing.reporting.report import render_notes, render_report, share_rows, summarize
from hf_smoothing.reporting.results import Result, read_results

NOISE = GaussianNoise(0.25)


def write_fixed_run(folder, n=100):
    """A finished run of `n` draws per image, and the largest radius that they prove."""
    write_run(folder, method="fixed")
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= {"alpha": 0.001, "n0": 10, "n": n, "max_draws": None, "draws": None, "radii": None}
    (folder / "run.json").write_text(json.dumps(run))
    return FixedRule(n0=10, n=n).largest_radius(NOISE)


@pytest.mark.parametrize("rule", [FixedRule(n0=8, n=300), TwoStageRule(max_draws=308)])
def test_the_largest_radius_is_what_hits_alone_prove(rule):
    runs, row = rule.start(NOISE, 1, 3), np.array([0])
    wanted = runs.start(row, None)
    while wanted:
        wanted = runs.update(row, np.array([[int(wanted[0]), 0, 0]]))
    largest = rule.largest_radius(NOISE)
    assert runs.outcomes(row).radii[0] <= largest
    if isinstance(rule, FixedRule):
        assert runs.outcomes(row).radii[0] == pytest.approx(largest)
    assert 0.4 < largest < 0.6


def test_rules_that_decide_or_count():
    assert SequentialRule((0.1, 0.3, 0.9), max_draws=200).largest_radius(NOISE) == 0.3
    assert SequentialRule((0.9,), max_draws=200).largest_radius(NOISE) == 0
    assert CountRule().largest_radius(NOISE) == 0


def test_a_report_says_out_of_reach_and_not_0(tmp_path):
    ceiling = write_fixed_run(tmp_path / "run")
    (result,) = read_results([tmp_path / "run"])
    assert result.largest_radius == ceiling
    report = summarize([result], [0.0, 0.25, 0.75])
    (row,) = share_rows(report)
    assert row["r = 0.75"] == "out of reach"
    assert row["r = 0.25"][0].isdigit()
    last = report["results"][0]["certified_accuracy"][-1]
    assert (last["share"], last["out_of_reach"]) == (None, True)
    assert f"no image can have a radius above {ceiling:.3f}"[:-1] in render_notes(report)
    assert "no image can have" not in render_notes(summarize([result], [0.0, 0.25]))


def test_a_radius_that_was_not_asked_for_is_a_bound_or_out_of_reach(tmp_path):
    folder = write_run(tmp_path / "run", method="sequential", radii=(0.0, 0.25))
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= {"alpha": 0.001, "max_draws": 1000}
    (folder / "run.json").write_text(json.dumps(run))
    (result,) = read_results([folder])
    # 1,000 draws prove about 2.4 sigma; 10 sigma is no radius of any probability below 1
    assert [result.standing(radius) for radius in (0.25, 0.5, 0.75, 2.5)] == [
        "counted", "floor", "out of reach", "out of reach",
    ]  # fmt: skip


def test_an_envelope_takes_what_is_measured(tmp_path):
    write_fixed_run(tmp_path / "few")
    results = read_results([tmp_path / "few", write_run(tmp_path / "unknown", (0.5,), seed=1)])
    rows = summarize(results, [0.25, 0.75], envelope=True)["envelope"]["certified_accuracy"]
    assert [row["from"] for row in rows][1] == "unknown, sigma = 0.5"


def write_two_stage_run(folder):
    """A finished two-stage run with three images whose draws all agree: two at radius 0.6, one at 0.3."""
    write_run(folder, method="two-stage")
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= {"alpha": 0.001, "draws": 600, "max_draws": 100_000, "radii": None}
    (folder / "run.json").write_text(json.dumps(run))
    records = pq.read_table(folder / "certificates.parquet").to_pylist()
    for position, record in enumerate(records):
        record["counts"] = [count + 1 for count in record["counts"] or [0, 0, 0]]
        if position in (0, 1, 3):
            agree = np.eye(3, dtype=int)[record["label"]] * 1000
            radius = 0.3 if position == 3 else 0.6
            record |= {"prediction": record["label"], "radius": radius, "counts": agree.tolist()}
    pq.write_table(pa.Table.from_pylist(records), folder / "certificates.parquet")
    (result,) = read_results([folder])
    return result


def test_planned_draws_that_all_agree_measure_nothing_beyond_their_radius(tmp_path):
    result = write_two_stage_run(tmp_path / "run")
    assert result.unanimous_radii == [0.6, 0.6, 0.3]
    report = summarize([result], [0.0, 0.25, 0.5, 0.75, 1.0])
    (row,) = share_rows(report)
    assert row["r = 0.25"].count("%") == 1  # as before, with its interval
    assert "\n" in row["r = 0.25"]
    assert row["r = 0.5"] == ">= 3.3%"
    assert row["r = 0.75"] == row["r = 1"] == "out of reach"  # not only beyond 0.95, what max_draws proves
    notes = render_notes(report)
    assert "all counted draws of 3 images gave the right class, so their radii (at most 0.599)" in notes
    assert "no image can have" not in notes
    assert "found, so the shares hold at every radius" not in notes
    assert "all counted draws" not in render_notes(summarize([result], [0.0, 0.25]))
    assert "| >= 3.3% | out of reach | out of reach |" in render_report(report)


def test_curves_are_dashed_where_they_are_lower_bounds(tmp_path):
    result = write_two_stage_run(tmp_path / "run")
    axes = Figure().subplots()
    draw_certified_accuracy(axes, [result])
    solid, dashed, ceiling = axes.lines
    assert max(solid.get_xdata()) == min(dashed.get_xdata()) == 0.3
    assert (dashed.get_linestyle(), max(dashed.get_xdata())) == ("--", 0.6)
    assert ceiling.get_xdata()[0] == 0.6


def test_an_envelope_marks_planned_draws_too(tmp_path):
    results = [write_two_stage_run(tmp_path / "planned")]
    results += read_results([write_run(tmp_path / "unknown", (0.5,), seed=1)])
    rows = summarize(results, [0.25, 0.5], envelope=True)["envelope"]["certified_accuracy"]
    assert [row["standing"] for row in rows] == ["counted", "floor"]
    alone = summarize([results[0], replace(results[0], name="again")], [0.5], envelope=True)["envelope"]
    assert [row["standing"] for row in alone["certified_accuracy"]] == ["floor"]


def test_the_metric_marks_what_the_draws_of_each_image_leave_open():
    columns = {"predictions": [0, 0, 1, -1, None], "references": [0, 0, 0, 0, 0], "radii": [0.6, 0.3, 0.2, 0, None]}
    counts = [[99, 1], [20, 0], [0, 9], [9, 0], None]  # a wrong image and an abstention count nowhere
    for compute in (certified_accuracy, CertifiedAccuracy().compute):
        rows = compute(**columns, counts=counts, thresholds=[0.3, 0.5, 0.75])["certified_accuracy"]
        assert [row["share"] for row in rows] == [0.4, 0.2, None]
        assert [row["is_floor"] for row in rows] == [False, True, False]
        assert [row["out_of_reach"] for row in rows] == [False, False, True]
    with pytest.raises(ValueError, match=r"counts\[0\]=\[\] must be the counts of all classes; the prediction is 0"):
        certified_accuracy(**columns, counts=[[], *counts[1:]])


def test_curves_mark_the_ceiling(tmp_path):
    ceiling = write_fixed_run(tmp_path / "run", n=200)
    (result,) = read_results([tmp_path / "run"])
    result.rows[0] |= {"prediction": 0, "radius": ceiling, "counts": [200, 0, 0]}
    axes = Figure().subplots()
    draw_certified_accuracy(axes, [result])
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [ceiling]
    assert [text.get_text() for text in axes.texts] == ["draws prove at most 0.45"]


def test_the_metric_measures_nothing_out_of_reach():
    columns = {"predictions": [0, 1], "references": [0, 0], "radii": [0.3, 0.2]}
    for compute in (certified_accuracy, CertifiedAccuracy().compute):
        rows = compute(**columns, thresholds=[0.25, 0.75], reach=0.4)["certified_accuracy"]
        assert [row["share"] for row in rows] == [0.5, None]
        assert [row["out_of_reach"] for row in rows] == [False, True]
        assert rows[1]["interval_95"] is None
    with pytest.raises(ValueError, match="reach=-1"):
        certified_accuracy(**columns, reach=-1)


def test_the_accuracy_of_all_certificates_is_not_called_clean():
    figures = certified_accuracy([0, -1], [0, 0], [0.3, 0.0])
    assert figures["certified_accuracy_at_0"] == 0.5
    assert "clean_accuracy" not in figures


def test_the_label_of_a_log_fits_beside_the_axis(tmp_path):
    plot_certified_accuracy(read_results([write_log(tmp_path / "cohen.tsv")]), tmp_path / "curves")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("L"))
    assert (pixels[:3] == 255).all()  # a label that is cut touches the edge
    assert (pixels[-3:] == 255).all()


@pytest.mark.parametrize(("name", "sigma"), [("sigma_0.25", 0.25), ("sigma0.5.tsv", 0.5), ("cohen.tsv", None)])
def test_the_name_of_a_log_tells_its_sigma(tmp_path, name, sigma):
    (result,) = read_results([write_log(tmp_path / name)])
    assert result.sigma == sigma


def test_a_log_is_out_of_reach_beyond_what_its_draws_prove(tmp_path):
    log = write_log(tmp_path / "sigma_0.25.log", LOG.replace("0.747", "0.45"))
    for n, text in ((), "0.0%"), ((200,), "out of reach"):  # 200 draws prove 0.455
        (result,) = read_results([log], "per_input", 0.001, n)
        report = summarize([result], [0.25, 0.5])
        (row,) = share_rows(report)
        assert row["r = 0.5"].startswith(text)
        assert row["r = 0.25"].startswith("50.0%")
        page = render_report(report)
        assert ("no image can have a radius above 0.45" in page) == bool(n)
        assert ("Its number of draws is the value of --log-n, 200." in page) == bool(n)
        assert "How the runs were made" not in page


def test_draws_of_a_log_that_say_nothing_or_cannot_be_are_refused(tmp_path):
    log = write_log(tmp_path / "sigma_0.25.log")
    with pytest.raises(
        ValueError,
        match=r"log_n=100 .* only together with alpha and sigma\. Give log_alpha",
    ):
        read_results([log], "per_input", None, [100])
    with pytest.raises(ValueError, match=r"log_n=100 .* only together with alpha and sigma"):
        read_results([write_log(tmp_path / "cohen.tsv")], "per_input", 0.001, [100])
    with pytest.raises(ValueError, match=r"log_n has 2 numbers for 1 logs"):
        read_results([log], "per_input", 0.001, [100, 200])
    with pytest.raises(ValueError, match=r"log_n=100 draws prove at most radius 0\.375 .* image 0 has 0\.747"):
        read_results([log], "per_input", 0.001, [100])
    with pytest.raises(ValueError, match="n=0"):
        read_results([log], "per_input", 0.001, [0])
    with pytest.raises(ValueError, match=r"log_n=5 draws prove at most radius 0\.000"):
        read_results([log], "per_input", 0.001, [5])


def test_each_log_has_its_own_draws(tmp_path):
    logs = [write_log(tmp_path / f"{name}-sigma_0.25.log", LOG.replace("0.747", "0.45")) for name in ("few", "many")]
    few, many = read_results(logs, "per_input", 0.001, [200, 10_000])
    assert few.largest_radius < 0.5 < many.largest_radius
    report = summarize([few, many], [0.5])
    assert [row["r = 0.5"].split("\n")[0].split("<")[0] for row in share_rows(report)] == ["out of reach", "0.0%"]
    assert "the value of --log-n, 200, 10,000." in render_report(report)


def test_the_command_takes_the_draws_of_logs(tmp_path):
    log = write_log(tmp_path / "sigma_0.25.log", LOG.replace("0.747", "0.45"))
    options = ["--log-alpha", "0.001", "--log-n", "200", "--output-dir", str(tmp_path / "report")]
    done = CliRunner().invoke(app, ["report", str(log), *options])
    assert done.exit_code == 0, done.output
    assert "out of reach" in done.output


@pytest.mark.parametrize("levels", [[0.5, 0.12], [0.12, 0.5]])
def test_two_levels_reach_as_far_as_the_larger_one(levels):
    choice = {"levels": levels}
    row = {"prediction": 1, "label": 1, "radius": 0.1, "sigma": levels[1], "level_choice": choice}
    settings = {"method": "fixed", "alpha": 0.001, "n0": 100, "n": 1000, "levels": levels}
    result = Result(Path("run"), "run", [row], {"settings": settings})
    share = ALPHA_SHARES[levels.index(0.5)]
    assert result.largest_radius == FixedRule(100, 1000, share * 0.001).largest_radius(GaussianNoise(0.5))


def test_counts_of_a_fallback_level_do_not_say_that_draws_ran_out():
    row = {"prediction": 1, "label": 1, "radius": 0.1, "counts": [0, 50], "sigma": 0.12}
    choice = {"levels": [0.5, 0.12]}
    for level, expected in ((0.12, []), (0.5, [0.1])):
        result = Result(Path("run"), "run", [{**row, "sigma": level, "level_choice": choice}], {})
        assert result.unanimous_radii == expected
