"""Attacks on certificates: right ones stand, and wrong ones are found out."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from hf_smoothing import GaussianNoise, SmoothedClassifier
from hf_smoothing.cli.app import app
from hf_smoothing.diagnostics.attacks import AttackSettings, attack
from hf_smoothing.diagnostics.audit import audit

SETTINGS = AttackSettings(steps=60, draws=4, restarts=1, directions=3, n=400)


@pytest.fixture
def image(linear):
    """Well inside of [0, 1], at a distance of 0.2 from the plane at which the linear classifier's answer changes."""
    grey = torch.full((3, 4, 4), 0.5)
    direction = linear.direction.view(3, 4, 4)
    return grey + direction * (0.2 - float(linear.margin(grey[None])))


def test_a_right_certificate_stands_and_a_wrong_one_falls(linear, image):
    smoothed = SmoothedClassifier(linear, GaussianNoise(0.25))
    exact = float(linear.exact_radius(image[None]))
    assert exact == pytest.approx(0.2, abs=1e-5)
    right = attack(smoothed, image, 1, 0.9 * exact, SETTINGS)
    assert right.violation is None
    assert right.smallest is not None
    assert exact <= right.smallest.norm < 1.8 * exact  # the gradient shows the way straight to the plane
    wrong = attack(smoothed, image, 1, 3 * exact, SETTINGS)
    assert wrong.violation is not None
    assert right.steps == SETTINGS.steps  # all that was asked for, and no more than it took
    assert 0 < wrong.steps < SETTINGS.steps
    assert wrong.violation.norm < 3 * exact
    assert wrong.violation.prediction == 0
    moved = image + wrong.violation.change
    assert float(linear.margin(moved[None])) < 0
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1


def test_the_nearest_other_image_shows_a_way_where_the_gradient_says_nothing(image):
    class Steps:
        """As the linear classifier, without a gradient."""

        def __init__(self, linear):
            self.linear = linear

        def __call__(self, images):
            side = (self.linear.margin(images) > 0).float() + 0 * images.sum()
            return torch.stack([1 - side, side], 1)

    from helpers.models import LinearClassifier

    direction = torch.ones(48) / 48**0.5
    linear = LinearClassifier(direction, -float(0.5 * direction.sum()) + 0.2)
    smoothed = SmoothedClassifier(Steps(linear), GaussianNoise(0.25))
    grey = torch.full((3, 4, 4), 0.5)
    others = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.3)])
    found = attack(smoothed, grey, 1, 0.4, SETTINGS, others)
    assert found.violation is not None
    assert found.violation.attack == "nearest other class"
    assert attack(smoothed, grey, 1, 0.19, SETTINGS, others).violation is None


def test_ways_that_lead_nowhere_are_passed_over(linear, image):
    """The picture itself among the others, which is no way at all, and a classifier without any gradient."""
    smoothed = SmoothedClassifier(linear, GaussianNoise(0.25))
    assert attack(smoothed, image, 1, 0.19, SETTINGS, image[None]).violation is None

    def same(images):
        return torch.zeros(len(images), 2) + torch.tensor([0.0, 1.0]) + 0 * images.sum()

    found = attack(SmoothedClassifier(same, GaussianNoise(0.25)), image, 1, 0.19, SETTINGS)
    assert found.violation is found.smallest is None
    assert found.steps == SETTINGS.steps


def test_settings_out_of_range(linear, image):
    for settings, message in (
        ({"n": 20}, "can show nothing"),
        ({"n": 23}, "it takes 24 at least"),
        ({"steps": 0}, "steps=0"),
        ({"alpha": 2.0}, "alpha=2"),
        ({"reach": 0.5}, "reach=0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            AttackSettings(**settings)
    with pytest.raises(ValueError, match="nothing to attack"):
        attack(SmoothedClassifier(linear, GaussianNoise(0.25)), image, 1, 0.0, SETTINGS)


def plant(run_dir, factor):
    """Make a run's certificates wrong."""
    path = run_dir / "certificates.parquet"
    table = pq.read_table(path)
    radii = pa.array(np.asarray(table["radius"]) * factor)
    pq.write_table(table.set_column(table.schema.get_field_index("radius"), "radius", radii), path)


def asked(run_dir, **options):
    """The command line of an audit."""
    return ["audit", str(run_dir), *(f"--{name}={value}" for name, value in options.items())]


def test_an_audit_of_a_run(certify, tmp_path):
    certify(tmp_path / "run", split="train", every=10, sigmas=(0.25, 0.5), max_draws=200)
    command = asked(tmp_path / "run", images=3, steps=12, draws=2, n=200, directions=2)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "6 certificates attacked" in done.output
    folder = tmp_path / "run" / "audit"
    results = json.loads((folder / "audit.json").read_text())
    assert [row["sigma"] for row in results["by_sigma"]] == [0.25, 0.5]
    assert results["violations"] == 0
    # cut short, it goes on
    lines = (folder / "audit.jsonl").read_text().splitlines()
    (folder / "audit.jsonl").write_text("\n".join(lines[:2]) + "\n")
    again = audit(tmp_path / "run", folder, AttackSettings(steps=12, draws=2, n=200, directions=2), images=3)
    assert [json.loads(line) for line in lines] == again.rows
    with pytest.raises(ValueError, match="other settings"):
        audit(tmp_path / "run", folder, AttackSettings(steps=13, draws=2, n=200), images=3)
    with pytest.raises(ValueError, match=r"nothing at sigma 0\.7"):
        audit(tmp_path / "run", folder, SETTINGS, sigmas=[0.25, 0.7])
    with pytest.raises(ValueError, match="images=0"):
        audit(tmp_path / "run", folder, SETTINGS, images=0)
    plant(tmp_path / "run", 1.01)
    with pytest.raises(ValueError, match="other settings"):  # of other certificates
        audit(tmp_path / "run", folder, AttackSettings(steps=12, draws=2, n=200, directions=2), images=3)


def test_an_audit_attacks_what_was_certified(certify, tmp_path):
    """Denoiser and resolution included."""
    certify(tmp_path / "run", split="train", every=20, max_draws=100, denoiser="wiener", noise_resolution="native")
    seen = []
    real = SmoothedClassifier.from_pretrained.__func__

    def spy(cls, *args, **kwargs):
        seen.append((kwargs["denoiser"], kwargs["noise_resolution"]))
        return real(cls, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SmoothedClassifier, "from_pretrained", classmethod(spy))
        found = audit(
            tmp_path / "run", tmp_path / "audit", AttackSettings(steps=6, draws=2, n=100, directions=2), images=2
        )
    assert seen == [("wiener", "native")]
    assert not found.violations


def test_a_planted_wrong_certificate_is_found_and_kept(certify, model, tmp_path):
    certify(tmp_path / "run", split="train", every=10, max_draws=200)
    plant(tmp_path / "run", 100.0)
    command = asked(tmp_path / "run", images=3, steps=60, draws=4, n=200, directions=2)
    done = CliRunner().invoke(app, [*command, "--output-dir", str(tmp_path / "audit")])
    assert done.exit_code == 1
    assert "VIOLATED" in done.output
    kept = sorted((tmp_path / "audit" / "violations").iterdir())
    assert len(kept) >= 2
    with np.load(next(path for path in kept if path.suffix == ".npz")) as found:
        pixels, change = (torch.from_numpy(found[name]) for name in ("pixels", "change"))
    assert pixels.shape == (3, 8, 8)
    said = json.loads(next(path for path in kept if path.suffix == ".json").read_text())
    assert float(change.norm()) == pytest.approx(said["norm"])
    results = json.loads((tmp_path / "audit" / "audit.json").read_text())
    (row,) = results["by_sigma"]
    assert row["violations"] == results["violations"] == len(kept) // 2
    assert row["least_norm_over_radius"] is None or row["least_norm_over_radius"] >= 1  # violations are not beyond
    assert said["settings"]["run"]["model_weights"]
    assert said["settings"]["attack"]["n"] == 200
    # all that it takes to see it again
    smoothed = SmoothedClassifier.from_pretrained(model, GaussianNoise(said["certificate"]["sigma"]))
    assert smoothed.predict(torch.stack([pixels, pixels + change]), 400, 1e-3, seed=5) == [
        said["certificate"]["prediction"],
        said["prediction"],
    ]


def test_a_model_with_another_image_processor_is_not_what_was_certified(certify, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    certify(tmp_path / "run", split="train", every=50, max_draws=100, model_name_or_path=str(tmp_path / "model"))
    processor = tmp_path / "model" / "preprocessor_config.json"
    processor.write_text(json.dumps({**json.loads(processor.read_text()), "resample": 3}))
    with pytest.raises(ValueError, match=r"it has another image_processor\.resample"):
        audit(tmp_path / "run", tmp_path / "audit", SETTINGS)


def test_runs_that_cannot_be_audited(certify, tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        audit(tmp_path, tmp_path / "audit", SETTINGS)
    certify(tmp_path / "counts", split="train", every=50, method="counts", n=20, max_draws=None)
    with pytest.raises(ValueError, match="no certificate with a radius above 0"):
        audit(tmp_path / "counts", tmp_path / "audit", SETTINGS)
    certify(tmp_path / "run", split="train", every=10, max_draws=200)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    run["settings"]["model_weights"] = "others"
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="it has another model_weights"):
        audit(tmp_path / "run", tmp_path / "audit", SETTINGS)
