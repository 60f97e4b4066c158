"""Audits of runs: right certificates stand, wrong ones are found, and an interrupted audit is resumed."""

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
from hf_smoothing.diagnostics.attacks import AttackSettings
from hf_smoothing.diagnostics.audit import _announce_time, audit

SETTINGS = AttackSettings(steps=60, draws=4, restarts=1, directions=3, n=400)


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


def test_a_long_audit_says_how_long_and_its_summary_counts_in_words(certify, linear, tmp_path, capsys):
    smoothed = SmoothedClassifier(linear, GaussianNoise(0.25))
    _announce_time(smoothed, torch.full((3, 4, 4), 0.5), AttackSettings(steps=10**6, draws=100), images=1)
    said = capsys.readouterr().err
    assert said.startswith("This takes about ")
    assert "the equivalent of 600,000,000 forward passes for each of 1 certificate. `--images`" in said
    certify(tmp_path / "run", split="train", every=20, max_draws=200)
    attack = AttackSettings(steps=6, draws=2, restarts=1, n=100, directions=2)
    summary = audit(tmp_path / "run", tmp_path / "audit", attack, images=1)
    assert capsys.readouterr().err.count("This takes") == 0  # short
    assert str(summary).startswith("1 certificate attacked with 6 gradient steps and ")
    assert " candidates: 0 violations. " in str(summary)


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
    assert smoothed.predict(torch.stack([pixels, pixels + change]), 1e-3, 400, seed=5) == [
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
