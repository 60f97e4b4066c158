"""Pages of results show the figures of their results files."""

import json
from pathlib import Path
from shutil import copy

import pytest
from helpers.finished_runs import write_run
from helpers.paths import ROOT, SHIPPED_MODEL

from hf_smoothing.hub.results_pages import render_accuracy, render_results, render_results_file, training_data
from hf_smoothing.reporting.report import summarize
from hf_smoothing.reporting.results import read_results

STUDY = json.loads(Path(__file__).with_name("count_head_study.json").read_text())


def table_rows(text, *start):
    """The cells of the rows of a page's tables that begin with some cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[: len(start)] == list(start)]


def test_accuracy_of_a_count_head_with_every_kind_of_claim():
    text = render_results("count_head", STUDY)
    (row,) = table_rows(text, "0.25", "Monte-Carlo, n = 10,000")
    assert row[2:] == [f"{share['share']:.1%}" for share in STUDY["errors"][0]["accuracy"]["monte_carlo"]]
    (row,) = table_rows(text, "0.5", "each radius alone, random halves, delta = 0.05")
    shares = [
        f"{share['share']:.1%}"
        for claim in STUDY["conformal"]
        if (claim["sigma"], claim["delta"]) == (0.5, 0.05) and claim["decided"] and len(claim["decided"]) == 1
        for share in claim["accuracy"]
        if [share["radius"]] == claim["decided"]
    ]
    assert row[2:] == ["-", *shares]
    (row,) = table_rows(text, "0.5", "own radius, random halves, delta = 0.05, proved too")
    (claim,) = [
        claim
        for claim in STUDY["conformal"]
        if (claim["sigma"], claim["delta"], claim["decided"]) == (0.5, 0.05, None)
    ]
    assert row[2:] == [f"{share['share']:.1%}" for share in claim["proved_accuracy"]]
    assert f"{STUDY['seconds_an_image']['ratio']:,.0f} times as long" in text


def test_estimates_beside_published_counts_and_how_far_they_are_off():
    folder = ROOT / "model_cards" / "cohen-resnet110-cifar10-counts" / "results"
    study = json.loads((folder / "cohen-counts.json").read_text())
    text = render_results("cohen_counts_accuracy", study)
    levels = next(iter(study["arms"].values()))
    for level in levels:
        for kind, name in (("estimate", "estimate (`none`)"), ("recalibrated", "recalibrated (`none`)")):
            (row,) = table_rows(text, f"{level['sigma']:g}", name)
            shares = [share["share"] for share in level[kind]["accuracy"]["estimate"]]
            assert row[2:] == [f"{share:.1%}" for share in [*shares, level[kind]["disagreement"]]]
    off = ", ".join(f"{100 * level['estimate']['largest_deviation']:.1f}" for level in levels)
    assert f"at most {off} points off" in text


def test_a_claim_stands_beside_that_of_the_own_calibration():
    wanted = {"sigma": 1.0, "delta": 0.1, "decided": None}
    claims = [claim for claim in STUDY["calibrated"] if wanted.items() <= claim.items()]
    (row,) = table_rows(render_results("count_head", STUDY), "1", "own radius", "0.1")
    assert row[-1].startswith(f"{claims[0]['miss_rate']:.1%} (")
    without = {**STUDY, "calibrated": []}
    (row,) = table_rows(render_results("count_head", without), "1", "own radius", "0.1")
    assert row[-1] == "-"
    assert "calibrated (" not in render_results("count_head_accuracy", without)


def test_a_training_shows_what_differs_between_its_stages():
    results = json.loads((SHIPPED_MODEL / "results" / "training.json").read_text())
    data = training_data(results)
    names = [row[" "] for row in data["rows"]]
    assert {"dataset_name", "max_train_steps", "consistency_weight", "steps"} <= set(names)
    assert not {"output_dir", "weight_decay", "resume_from_checkpoint"} & set(names)
    assert data["rows"][names.index("learning_rate")]["2. finetune"] == "0.002"
    text = render_results("training", results)
    for stage in data["stages"]:
        assert f"accelerate launch {stage['command']}" in text


def test_the_speed_of_the_engine_is_shown_where_it_was_measured(tmp_path):
    benchmark = tmp_path / "benchmark.json"
    copy(SHIPPED_MODEL / "results" / "benchmark.json", benchmark)
    assert "draws per second" not in render_results_file("benchmark", benchmark)
    speed = {
        "classifier": "shipped model", "rule": "find", "batch_size": 128, "engine_draws_per_second": 1234.4,
        "bare_draws_per_second": 1300.0, "ratio": 0.9496, "noise_share": 0.02,
    }  # fmt: skip
    engine = {"rows": [speed], "device": "cpu", "num_threads": 2, "seed": 0, "command": "engine", "versions": {}}
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    text = render_results_file("benchmark", benchmark)
    assert "1,234 draws per second with the shipped model (cpu, 2 threads), 0.950 times" in text


def test_the_benchmark_shows_every_comparison():
    results = json.loads((SHIPPED_MODEL / "results" / "benchmark.json").read_text())
    text = render_results("benchmark", results)
    for result in results["find"]:
        for row in result["equal_radius"]:
            start = [result["name"], f"{result['sigma']:g}", f"{row['n']:,}", f"{row['mean_radius']:.3f}"]
            (cells,) = table_rows(text, *start)
            assert cells[4] == f"{row['two_stage_share']:.2f}"
    compared, over_all = text.split("Over all images, hopeless ones included")
    for row in results["decide"]:
        start = [row["name"], f"{row['sigma']:g}", f"{row['radius']:g}"]
        assert len(table_rows(compared, *start, f"{row['compared']} of {row['clearing']}")) == 1
        (cells,) = table_rows(over_all, *start)
        sequential = row["rules"]["sequential"]
        assert cells[3] == f"{sequential['mean']:,.0f} ({sequential['median']:,.0f}), {sequential['claimed']:.1%}"


def test_an_unknown_template_is_refused():
    with pytest.raises(ValueError, match=r"'guess' is unknown: use report, .*benchmark"):
        render_results("guess", {})


def test_the_table_of_a_card_says_what_its_certificates_rest_on(tmp_path):
    runs = [write_run(tmp_path / "two", (0.25, 0.5), sampling=["lattice"]), write_run(tmp_path / "b", alpha=0.01)]
    two, other = (summarize(read_results([run]), [0, 0.25]) for run in runs)
    table = render_accuracy({"CIFAR-10": two})
    for said in (
        "`per_input`; sampling: `lattice`. With 95 % confidence, at most 1 of 59 certificates at each noise level",
        "less 1.67 points (1/60), in all rows at once.",
    ):
        assert said in table
    old = [{name: value for name, value in entry.items() if name != "most_wrong"} for entry in two["results"]]
    assert "confidence" not in render_accuracy({"CIFAR-10": {**two, "results": old}})
    with pytest.raises(ValueError, match=r"sigma = 0\.5: 0\.001; b, sigma = 0\.25: 0\.01"):
        render_accuracy({"CIFAR-10": {**two, "results": [*two["results"], *other["results"]]}})
    with pytest.raises(ValueError, match=r"B: per_input, alpha = 0\.01"):
        render_accuracy({"A": two, "B": other})
    fewer = summarize(read_results([runs[0], write_run(tmp_path / "fewer", images=30)]), [0, 0.25])
    with pytest.raises(
        ValueError, match=r"The runs of 'A' have different images.*two, sigma = 0\.5: 60; fewer.*: 30\."
    ):
        render_accuracy({"A": fewer})
