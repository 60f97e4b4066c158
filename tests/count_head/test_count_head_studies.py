"""The scripts that say how good a count head is, on a model and a head as small as can be."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.finished_runs import rows

from hf_smoothing.count_head.calibrate import (
    calibrate_count_head,
    refuse_shared_images,
    refuse_training_images,
)
from hf_smoothing.count_head.measured_counts import read_counts
from hf_smoothing.hub.results_pages import render_results
from hf_smoothing.reporting.report import render_notes, summarize
from hf_smoothing.reporting.results import read_results
from hf_smoothing.runs.dataset_run import RunSettings, certify_dataset
from hf_smoothing.utils.processes import start_processes

SIGMAS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def folder(processes, model, parquet, tmp_path_factory):
    """Two runs of counts, a head trained on one of them, and Monte-Carlo certificates."""
    folder = tmp_path_factory.mktemp("studies")
    for name, chosen in {  # the head learns from one split, and is calibrated and judged on the other
        "counts": {"method": "counts", "n": 20, "every": 5},
        "fixed": {"method": "fixed", "n0": 10, "n": 60, "every": 5},
        "others": {"method": "fixed", "n0": 10, "n": 60, "every": 5, "split": "test[1:]"},
        "sequential": {"max_draws": 100, "every": 5},
    }.items():
        split = "train" if chosen.get("method") == "counts" else "test"
        settings = RunSettings(model, parquet, SIGMAS, **{"split": split, "seed": 0, **chosen})
        certify_dataset(settings, folder / name, accelerator=start_processes())
    done = processes.run(
        "scripts/train_count_head.py", "--model_name_or_path", model, "--counts", folder / "counts",
        "--num_train_epochs", 20, "--per_device_train_batch_size", 13, "--output_dir", folder / "head",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calibrate_count_head(folder / "head", folder / "others")
    certify_dataset(
        RunSettings(
            model, parquet, SIGMAS, split="test", max_draws=100, every=5, count_head=str(folder / "head"), seed=0
        ),
        folder / "steered",
        accelerator=start_processes(),
    )
    return folder


@pytest.fixture
def run(processes, model, folder, tmp_path):
    """Run the script of a study to the end; its results go to `tmp_path`."""

    def run_study(script, *options):
        command = ("--model", model, "--run", folder / "fixed", *options, "--output_dir", tmp_path)
        done = processes.run(f"scripts/studies/{script}.py", *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_study


def test_a_head_just_trained_has_a_card(folder):
    assert "Jensen-Shannon divergence" in (folder / "head" / "README.md").read_text()


@pytest.mark.slow
def test_a_study_of_a_head(run, folder, tmp_path):
    beside = ("--sequential", folder / "sequential", folder / "steered", "--counts", folder / "counts")
    more = (
        "--count_head",
        folder / "head",
        "--timed_draws",
        "256",
        "--splits",
        "20",
        "--draws_a_repeat",
        "25000",
        *beside,
    )
    out = run("count_head_study", *more)
    found = json.loads((tmp_path / "study.json").read_text())
    assert [row["sigma"] for row in found["errors"]] == list(SIGMAS)
    assert all(row["images"] == 40 and row["n"] == 60 for row in found["errors"])
    each = [[0.25], [0.5], [0.75], [1.0]]
    shown = {0.25: each[:1], 0.5: [[0.25, 0.5], *each[:2]], 1.0: [[0.25, 0.5, 0.75, 1.0], *each]}  # by 60 draws
    asked = [(sigma, delta, decided) for sigma in SIGMAS for delta in (0.1, 0.05) for decided in (None, *shown[sigma])]
    for claims in (found["conformal"], found["calibrated"]):
        assert [(row["sigma"], row["delta"], row["decided"]) for row in claims] == asked
    assert all("test[1:]" in row["calibrated_on"] and 0 <= row["miss_rate"] < 0.5 for row in found["calibrated"])
    assert [(one["sigma"], one["with_head"]) for one in found["sequential"]] == [
        (sigma, steered) for steered in (False, True) for sigma in SIGMAS
    ]
    for one in found["sequential"]:
        certificates = rows(folder / ("steered" if one["with_head"] else "sequential"))
        mine = [row for row in certificates if row["sigma"] == one["sigma"]]
        assert one["draws"] == sum(row["num_samples"] for row in mine) / len(mine)
        right = [row["prediction"] == row["label"] and row["radius"] >= 0.25 for row in mine]
        assert one["accuracy"][1]["share"] == sum(right) / len(mine)
    times = found["seconds_an_image"]
    assert times["ratio"] == pytest.approx(times["usual"] / times["estimate"])
    assert 0 < found["payback"]["images"] < found["payback"]["images_of_sequential"]
    assert f"{times['ratio']:,.0f} times that" in out
    assert f"{times['ratio']:,.0f} times as long" in render_results("count_head", found)
    for row in found["conformal"]:
        shares = zip(row["proved_accuracy"], row["accuracy"])
        assert all(proved["share"] <= claimed["share"] for proved, claimed in shares)
    assert (tmp_path / "count-head.png").stat().st_size > 10_000


def test_draws_with_and_without_a_head(processes, model, parquet, folder, tmp_path):
    head = str(folder / "head")
    for number, (name, count_head) in enumerate({"a": None, "b": None, "a-head": head, "b-head": head}.items()):
        settings = {"split": "test", "every": 5, "max_draws": 60, "radii": [0.25], "seed": number}
        certify_dataset(
            RunSettings(model, parquet, (0.5,), count_head=count_head, **settings),
            tmp_path / name,
            accelerator=start_processes(),
        )

    def compare(*pairs):
        return processes.run(
            "scripts/studies/guided_runs.py", "--model", model, "--count_head", head, "--output_dir", tmp_path,
            "--frequencies", folder / "sequential", "--repeats", 3, "--resamplings", 200, "--pairs", *pairs,
        )  # fmt: skip

    done = compare(f"{tmp_path / 'a'},{tmp_path / 'b'}={tmp_path / 'a-head'},{tmp_path / 'b-head'}")
    assert done.returncode == 0, done.stderr
    study = json.loads((tmp_path / "guided.json").read_text())
    (row,) = study["pairs"]
    assert (row["images"], row["runs"]) == (40, 2)
    for side, names in (("without", ("a", "b")), ("with", ("a-head", "b-head"))):
        records = [record for name in names for record in rows(tmp_path / name)]
        assert row[side]["passes"] == pytest.approx(sum(record["num_samples"] for record in records) / 80)
        right = [record["prediction"] == record["label"] and record["radius"] >= 0.25 for record in records]
        assert row[side]["certified"] == sum(right) / 80
    assert row["ratio"] == pytest.approx(row["without"]["passes"] / row["with"]["passes"])
    assert row["interval_95"][0] < row["ratio"] < row["interval_95"][1]
    assert all(1 < figures["mean"] <= 61 for figures in row["simulated"].values())
    ratio = f"{row['ratio']:.2f} ({row['interval_95'][0]:.2f} to {row['interval_95'][1]:.2f})"
    assert f"| sequential | 0.5 | r = 0.25 | {row['without']['passes']:.1f} | " in render_results("guided_runs", study)
    assert f" | {ratio} | " in render_results("guided_runs_summary", study)
    swapped = compare(f"{tmp_path / 'a-head'}={tmp_path / 'a'}")
    assert swapped.returncode
    assert "without a count head first" in swapped.stderr
    others = compare(f"{folder / 'sequential'}={tmp_path / 'a-head'}")
    assert others.returncode
    assert "differ in" in others.stderr


def test_a_run_selects_claims_among_all_of_its_images(model, parquet, folder, tmp_path):
    """However the run was interrupted: the claims are made from all records, at its end."""
    head = str(folder / "head")
    options = {"split": "test", "method": "surrogate", "count_head": head, "radii": [0.0, 0.25], "seed": 0}
    settings = RunSettings(model, parquet, (0.5,), false_claims=0.3, **options)
    certify_dataset(settings, tmp_path / "run", accelerator=start_processes())
    finished = rows(tmp_path / "run")
    assert {row["guarantee"] for row in finished} == {"selected"}
    assert {row["false_claims"] for row in finished} == {0.3}
    shard = next((tmp_path / "run" / "shards").glob("*.jsonl"))
    lines = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(lines[: len(lines) // 2]))  # as a killed run leaves it
    certify_dataset(settings, tmp_path / "run", accelerator=start_processes())
    assert [{**row, "seconds": 0} for row in rows(tmp_path / "run")] == [{**row, "seconds": 0} for row in finished]
    report = summarize(read_results([tmp_path / "run"]))
    assert report["guarantee"] == "selected"
    assert "at most a share 0.3 of the claims at each radius exceeds" in render_notes(report)


def test_heads_are_not_judged_on_their_training_images(folder):
    with pytest.raises(ValueError, match="was trained on the split 'train'"):
        refuse_training_images(folder / "head", read_counts(folder / "counts").settings)
    fixed = read_counts(folder / "fixed").settings
    refuse_training_images(folder / "head", fixed)
    # by whatever name the same images go
    counted = read_counts(folder / "counts").settings
    named = {**fixed, "dataset_name": str(Path(fixed["dataset_name"]).parent / "." / Path(fixed["dataset_name"]).name)}
    for split in ("train", "train[5:]", "test+train[:10]"):
        with pytest.raises(ValueError, match="was trained on the split"):
            refuse_shared_images(counted, {**named, "split": split})
    refuse_shared_images({**counted, "dataset_name": "someone/else"}, {**fixed, "split": "train"})


def test_a_study_on_images_of_the_calibration_is_refused(processes, model, folder, tmp_path):
    shutil.copytree(folder / "head", tmp_path / "head")
    calibrate_count_head(tmp_path / "head", folder / "fixed")
    done = processes.run(
        "scripts/studies/count_head_study.py", "--model", model, "--output_dir", tmp_path / "study",
        "--run", folder / "fixed", "--count_head", tmp_path / "head",
    )  # fmt: skip
    assert done.returncode == 1
    assert "calibrated on 40 of the images of this very run" in done.stderr
