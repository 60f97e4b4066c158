"""The scripts that compare count heads on published counts, on tables as small as can be."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.count_head.comparison import predict_counts
from hf_smoothing.count_head.measured_counts import read_count_table
from hf_smoothing.count_head.prediction_tables import read_predictions, write_predictions
from hf_smoothing.hub.results_pages import render_results, render_results_file

SIGMAS = (0.25, 1.0)


@pytest.fixture(scope="module")
def table(tmp_path_factory, demo_images):
    """Counts of the first 60 demo images: the true class leads."""
    generator = np.random.default_rng(0)
    labels = np.tile(np.array(demo_images["label"])[:60], 2)
    shares = generator.dirichlet(np.full(10, 0.3), 120)
    shares[np.arange(120), labels] += 2 * generator.random(120)
    counts = generator.multinomial(100_000, shares / shares.sum(1, keepdims=True))
    path = tmp_path_factory.mktemp("counts") / "counts.parquet"
    columns = {"index": np.tile(np.arange(60), 2), "sigma": np.repeat(SIGMAS, 60), "counts": list(counts)}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def measured(table, parquet):
    return read_count_table(table, parquet, "train")


def test_predictions_are_read_in_the_order_of_the_counts(measured, tmp_path):
    probabilities = np.random.default_rng(1).dirichlet(np.ones(10), 120)
    write_predictions(measured, probabilities, tmp_path / "all.parquet")
    rows = pq.read_table(tmp_path / "all.parquet")
    pq.write_table(rows.take(np.random.default_rng(2).permutation(120)), tmp_path / "shuffled.parquet")
    np.testing.assert_array_equal(read_predictions(measured, tmp_path / "shuffled.parquet"), probabilities)
    pq.write_table(rows.slice(0, 100), tmp_path / "some.parquet")
    with pytest.raises(ValueError, match=r"lacks a prediction for image 40 at sigma = 1\."):
        read_predictions(measured, tmp_path / "some.parquet")


@pytest.mark.slow
def test_a_head_and_the_papers_surrogate_are_compared(table, measured, parquet, model, processes, tmp_path):
    def run(script, *options):
        done = processes.run(f"scripts/{script}.py", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    data = ("--counts", table, "--dataset_name", parquet)
    run(
        "train_count_head", *data, "--model_name_or_path", model, "--num_train_epochs", 4, "--loss", "probit",
        "--per_device_train_batch_size", 10, "--own_backbone", "--output_dir", tmp_path / "head",
    )  # fmt: skip
    run(
        "studies/predict_counts", *data, "--split", "train", "--count_head", tmp_path / "head",
        "--output", tmp_path / "ours.parquet",
    )  # fmt: skip
    predictor = CountPredictor.from_pretrained(tmp_path / "head")
    expected = predict_counts(predictor, measured, tmp_path / "head")
    np.testing.assert_allclose(read_predictions(measured, tmp_path / "ours.parquet"), expected)
    for sigma in SIGMAS:
        run(
            "train_count_head", *data, "--model_name_or_path", model, "--max_train_steps", 2, "--loss", "probit",
            "--sigmas", sigma, "--per_device_train_batch_size", 10, "--own_backbone",
            "--output_dir", tmp_path / f"{sigma:g}",
        )  # fmt: skip
    heads = [tmp_path / f"{sigma:g}" for sigma in SIGMAS]
    predict = ("--split", "train", "--output", tmp_path / "each.parquet", "--count_head")
    run("studies/predict_counts", *data, *predict, *heads)
    for head in heads:
        predictor = CountPredictor.from_pretrained(head)
        own = measured.select_sigmas(predictor.model.config.count_sigmas)
        np.testing.assert_allclose(
            read_predictions(own, tmp_path / "each.parquet"), predict_counts(predictor, own, head)
        )
    twice = processes.run("scripts/studies/predict_counts.py", *data, *predict, heads[0], tmp_path / "head")
    assert twice.returncode
    assert "learned the same noise level" in twice.stderr
    run(
        "studies/head_budgets", *data, "--split", "train", "--output_dir", tmp_path / "study",
        "--heads", f"all={tmp_path / 'ours.parquet'}={tmp_path / 'head'}",
        f"each={tmp_path / 'each.parquet'}={heads[0]},{heads[1]}",
    )  # fmt: skip
    run(
        "studies/paper_surrogate", *data, "--test_counts", table, "--seconds", 0.1, "--batch_size", 10,
        "--output_dir", tmp_path / "paper",
    )  # fmt: skip
    trainings = json.loads((tmp_path / "paper" / "results.json").read_text())["trainings"]
    assert [training["sigma"] for training in trainings] == list(SIGMAS)
    assert all(training["updates"] >= 1 and training["seconds"] >= 0.1 for training in trainings)
    out = run(
        "studies/cohen_counts_study", *data, "--split", "train", "--training_counts", table, "--splits", 5,
        "--resamplings", 5, "--samples", 10, 30, "--certificates", 20, 30, "--repeats", 3,
        "--predictions", f"ours={tmp_path / 'ours.parquet'}", f"paper={tmp_path / 'paper' / 'predictions.parquet'}",
        "--count_head", tmp_path / "head", "--batch_size", 2, "--output_dir", tmp_path / "study",
    )  # fmt: skip
    assert "paper: recalibrated" in out
    study = json.loads((tmp_path / "study" / "cohen-counts.json").read_text())
    tops = measured.counts.argmax(1) == measured.labels
    for level, sigma in enumerate(SIGMAS):
        certified = tops & (measured.p_lower > 0.5) & (measured.sigmas == sigma)
        for arm in ("ours", "paper"):
            row = study["arms"][arm][level]
            assert row["sigma"] == sigma
            share = row["estimate"]["accuracy"]["monte_carlo"][0]["share"]
            assert share == pytest.approx(certified.sum() / 60)
            assert row["estimate"]["disagreement"] == row["recalibrated"]["disagreement"]
            assert row["estimate"]["published"]["kept"] <= 1 - row["estimate"]["disagreement"]
    # the images that are judged are here those that were counted for training
    accuracy = [row["estimate"]["accuracy"]["monte_carlo"] for row in study["arms"]["ours"]]
    assert [row["accuracy"] for row in study["training_images"]] == accuracy
    assert {row["false_claims"] for row in study["selection"]} == {0.1, 0.2}
    assert {row["estimates"] for row in study["estimated_shares"]} == {"head", "useless"}
    assert study["seconds_an_image"]["ratio"] > 1
    assert [(row["sigma"], row["sample"]) for row in study["few_certificates"]] == [
        (s, n) for s in SIGMAS for n in (20, 30)
    ]
    page = render_results_file("cohen_counts", tmp_path / "study" / "cohen-counts.json")
    for row in study["few_certificates"]:
        assert f"| {row['sigma']:g} | {row['sample']} | {100 * row['recalibrated']['mean']:.1f} |" in page
    budgets = json.loads((tmp_path / "study" / "budgets.json").read_text())["heads"]
    assert [(row["heads"], row["steps"]) for row in budgets] == [(1, 20), (2, 4)]
    # the same predictions as in the study
    assert [row["disagreement"] for row in budgets[0]["levels"]] == [
        row["estimate"]["disagreement"] for row in study["arms"]["ours"]
    ]
    assert page.count("| each | 40 |") == len(SIGMAS)
    assert "One head for all" not in render_results("cohen_counts", study)
    for row in study["estimated_shares"]:
        assert f"| {row['estimates']} | {row['sample']} | {row['coverage']:.1%} |" in page
    assert page.count("| Monte-Carlo, training images |") == len(SIGMAS)
    assert "training images" not in render_results("cohen_counts", {**study, "training_images": None})
    shares = [f"{share['share']:.1%}" for share in study["arms"]["paper"][1]["recalibrated"]["accuracy"]["estimate"]]
    assert f"| 1 | paper, recalibrated | {' | '.join(shares)} |" in page
    for name in ("accuracy", "images"):
        assert (tmp_path / "study" / f"cohen-counts-{name}.png").stat().st_size > 1000
