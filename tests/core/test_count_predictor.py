"""A trained count head on its way through pipeline, command line and dataset runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.finished_runs import rows
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

import hf_smoothing  # noqa: F401
from hf_smoothing import GaussianNoise, MixedNoiseViTForCountPrediction, SmoothedClassifier, UniformNoise
from hf_smoothing.cli.app import app
from hf_smoothing.core.calibration import CALIBRATION_FILE, Calibration
from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.core.rule_protocols import probabilities_proving
from hf_smoothing.count_head.measured_counts import read_counts
from hf_smoothing.count_head.training import CountHeadSettings, build_count_model
from hf_smoothing.reporting.report import render_notes, summarize
from hf_smoothing.reporting.results import read_results
from hf_smoothing.runs.dataset_run import RunSettings, certify_dataset
from hf_smoothing.utils.processes import start_processes


@pytest.fixture(scope="module")
def head(model, tmp_path_factory):
    """Untrained: it says what the classifier says of the clean image."""
    folder = tmp_path_factory.mktemp("head")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    MixedNoiseViTForCountPrediction.from_pretrained(model, count_sigmas=[0.25, 1.0]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def fixed_run(model, parquet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fixed")
    settings = RunSettings(model, parquet, (0.25, 1.0), split="train", every=4, method="fixed", n0=10, n=60, seed=0)
    certify_dataset(settings, folder, accelerator=start_processes())
    return folder


def test_a_head_knows_no_other_noise(head, model):
    with pytest.raises(ValueError, match="The count head knows gaussian noise, not uniform"):
        SmoothedClassifier.from_pretrained(model, UniformNoise(0.5), count_head=head)


def test_from_head_to_claims_about_most_images(head, model, fixed_run, certify, parquet, tmp_path, demo_images, capfd):
    estimated = {"split": "train", "every": 5, "method": "surrogate", "max_draws": None, "count_head": head}
    certify(tmp_path / "estimates", sigmas=(0.25, 0.5), **estimated)
    shown = capfd.readouterr().err
    assert "estimating: 100%" in shown
    assert "claimed at radius 0 (sigma 0.5)" in shown
    estimates = rows(tmp_path / "estimates")
    assert len(estimates) == 80
    assert {(row["guarantee"], row["num_samples"], row["delta"]) for row in estimates} == {("none", 1, None)}
    with pytest.raises(ValueError, match="takes a calibrated count head"):
        certify(tmp_path / "too-early", delta=0.1, **estimated)

    # whatever is there before, such as a calibration of an earlier version
    (Path(head) / CALIBRATION_FILE).write_text('{"scores": {}}')
    with pytest.raises(ValueError, match="holds no calibration: hf-smoothing calibrate makes one"):
        CountPredictor.from_pretrained(head)
    done = CliRunner().invoke(app, ["calibrate", head, str(fixed_run)])
    assert done.exit_code == 0, done.output
    assert "50" in done.output
    calibration = Calibration.load(Path(head) / CALIBRATION_FILE)
    assert (calibration.n, calibration.alpha, calibration.images) == (60, 0.001, {0.25: 50, 1.0: 50})
    assert "every 4" in calibration.dataset

    certify(tmp_path / "marginal", sigmas=(0.25,), delta=0.1, **estimated)
    claims = rows(tmp_path / "marginal")
    assert {row["guarantee"] for row in claims} == {"marginal"}
    assert {(row["delta"], row["calibration"]) for row in claims} == {(0.1, calibration.description)}
    settings = json.loads((tmp_path / "marginal" / "run.json").read_text())["settings"]
    assert settings["calibration"]["shifts"] == {"0.25": calibration.shift(0.25, 0.1)}
    assert settings["count_head_weights"] != settings["model_weights"]
    # deciding a few radii it claims these, and takes no more lowering
    certify(tmp_path / "decided", sigmas=(0.25,), delta=0.1, radii=(0.0, 0.1), **estimated)
    radii = [row["radius"] for row in rows(tmp_path / "decided")]
    assert all(radius == pytest.approx(0) or radius == pytest.approx(0.1) for radius in radii)
    settings = json.loads((tmp_path / "decided" / "run.json").read_text())["settings"]
    assert settings["radii_decided"] == {"0.25": [0.0, 0.1]}
    needed = probabilities_proving((0.0, 0.1), GaussianNoise(0.25))
    assert (
        settings["calibration"]["shifts"]["0.25"]
        == calibration.shift(0.25, 0.1, needed)
        <= calibration.shift(0.25, 0.1)
    )
    with pytest.raises(ValueError, match="radii"):  # of other radii it is another run
        certify(tmp_path / "decided", sigmas=(0.25,), delta=0.1, radii=(0.1,), **estimated)
    report = summarize(read_results([tmp_path / "decided"]), (0.0, 0.1, 0.2))
    (entry,) = report["results"]
    assert "the claim is the largest of the radii 0, 0.1" in render_notes(report)
    assert [share["standing"] for share in entry["certified_accuracy"]] == ["counted", "counted", "floor"]
    with pytest.raises(ValueError, match=r"n=60 draws can never certify radius 0\.9"):
        certify(tmp_path / "beyond", sigmas=(0.25,), delta=0.1, radii=(0.1, 0.9), **estimated)
    # at a level that was not calibrated there is no claim
    with pytest.raises(ValueError, match=r"sigma=0\.5 was not calibrated"):
        certify(tmp_path / "other-level", sigmas=(0.5,), delta=0.1, **estimated)
    # and another calibration makes another run of it
    other = {0.25: (3.0,) * 50}
    Calibration(other, other, 60, 0.001, "others", model).save(Path(head) / CALIBRATION_FILE)
    with pytest.raises(ValueError, match="calibration"):
        certify(tmp_path / "marginal", sigmas=(0.25,), delta=0.1, **estimated)

    certify_pictures = pipeline("certified-image-classification", model=model, sigma=0.25, count_head=head)
    pictures = demo_images["image"][:3]
    results = certify_pictures(pictures, method="surrogate")
    assert [result["guarantee"] for result in results] == ["none"] * 3
    assert (
        certify_pictures(pictures, method="surrogate", delta=0.1)[0]["calibration"]
        == "others; Monte-Carlo with n = 60"
    )
    assert {result["guarantee"] for result in certify_pictures(pictures, max_draws=50, radius=0.1)} == {"per_input"}
    pictures[0].save(tmp_path / "one.png")
    command = ["certify", str(tmp_path / "one.png"), "--model", model, "--method", "surrogate", "--count-head", head]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(done.stdout)["radius"] == results[0]["radius"]


def test_a_prediction_does_not_depend_on_the_batch(head):
    predictor = CountPredictor.from_pretrained(head)
    images = torch.rand(40, 3, 8, 8)
    alone = torch.cat([predictor(image[None], 0.5) for image in images])
    torch.testing.assert_close(predictor(images, 0.5), alone, atol=1e-12, rtol=0)


def test_what_cannot_be_asked_or_calibrated(head, model, fixed_run, certify, tmp_path):
    with pytest.raises(ValueError, match="has no count head"):
        CountPredictor.from_pretrained(model)
    with pytest.raises(ValueError, match="has no count head"):
        pipeline("certified-image-classification", model=model, count_head=model)
    with pytest.raises(ValueError, match="cannot be loaded"):
        CountPredictor.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="has the classes"):
        CountPredictor.from_pretrained(head, class_names=["cat", "dog"])
    with pytest.raises(ValueError, match="takes a count head"):
        certify(method="surrogate", max_draws=None)
    with pytest.raises(ValueError, match="no meaning for method 'fixed'"):
        certify(method="fixed", count_head=head)
    for arguments, message in (
        ([head, str(tmp_path)], "holds no finished run"),
        ([str(tmp_path / "nothing"), str(fixed_run)], "There is no"),
    ):
        done = CliRunner().invoke(app, ["calibrate", *arguments])
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())
    trained = tmp_path / "trained"
    shutil.copytree(head, trained)
    (trained / "results").mkdir(exist_ok=True)
    counts = read_counts(fixed_run)
    (trained / "results" / "training.json").write_text(
        json.dumps({"counts": {name: counts.settings[name] for name in ("dataset_name", "split")}})
    )
    done = CliRunner().invoke(app, ["calibrate", str(trained), str(fixed_run)])
    assert done.exit_code == 2
    assert "was trained on the split" in " ".join(done.stderr.split())


def test_another_backbone_may_predict_the_counts_of_any_classifier(tiny_model_dir, fixed_run):
    counts = read_counts(fixed_run)
    with pytest.raises(ValueError, match="own_backbone"):
        build_count_model(CountHeadSettings(str(tiny_model_dir)), counts)
    model = build_count_model(CountHeadSettings(str(tiny_model_dir), own_backbone=True), counts)
    assert list(model.config.id2label.values()) == counts.settings["label_names"]
    assert model(torch.rand(2, 3, 8, 8), sigma=0.5).probabilities.shape == (2, 10)


def test_a_count_head_is_refused_as_classifier(head, parquet, tmp_path):
    """It loads as one, but its class scores are no answers."""
    with pytest.raises(ValueError, match=r"is a count head, .* pass it as count_head"):
        SmoothedClassifier.from_pretrained(head, GaussianNoise(0.25))
    command = ["certify", str(tmp_path / "one.png"), "--model", head, "--max-draws", "50"]
    Image.new("RGB", (8, 8), "red").save(command[1])
    done = CliRunner().invoke(app, command)
    assert done.exit_code != 0
    assert "is a count head" in " ".join(done.stderr.split())
