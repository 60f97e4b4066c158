"""Runs with sigma `auto`: records, resuming, reports."""

import json
import shutil

import pytest
from helpers.finished_runs import rows
from helpers.routers import save_router

from hf_smoothing.reporting.report import render_report, summarize
from hf_smoothing.reporting.results import read_results
from hf_smoothing.runs.settings import RunSettings


@pytest.fixture(scope="module")
def routed_model(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed") / "model"
    shutil.copytree(model, folder)
    return save_router(folder)


SETTINGS = {"sigmas": (0.25, "auto"), "every": 20, "draws": 40, "max_draws": 300}


def test_records_of_a_routed_run(certify, routed_model, tmp_path):
    summary = certify(model_name_or_path=routed_model, **SETTINGS)
    assert summary.num_records == 20
    records = rows(tmp_path / "run")
    assert [row["routing"] is None for row in records] == [True] * 10 + [False] * 10
    assert [row["index"] for row in records] == [*range(0, 200, 20)] * 2
    for row in records[10:]:
        routing = row["routing"]
        assert row["sigma"] in routing["levels"] == [0.25, 0.5]
        assert sum(routing["votes"]) == routing["num_samples"] == 256
        assert routing["alpha"] + routing["classifier_alpha"] == pytest.approx(row["alpha"])
        radii = [routing["classifier_radius"], *([] if routing["radius"] is None else [routing["radius"]])]
        assert row["radius"] == min(radii)
        assert row["sigma"] in routing["kept"]
        assert (row["prediction"] == -1) == (row["radius"] == 0)
    assert {row["sigma"] for row in records[10:]} == {0.25, 0.5}
    assert any(row["radius"] > 0 for row in records[10:])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["sigmas"] == [0.25, "auto"]
    assert run["settings"]["router_weights"]


def test_a_routed_run_resumes_with_the_same_records(certify, routed_model, tmp_path):
    certify(model_name_or_path=routed_model, **SETTINGS)
    expected = rows(tmp_path / "run")
    shard = tmp_path / "run/shards/records-rank00000.jsonl"
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[:14]))
    (tmp_path / "run/certificates.parquet").unlink()
    assert certify(model_name_or_path=routed_model, **SETTINGS, batch_size=7).num_new == 6
    assert rows(tmp_path / "run") == expected


def test_a_report_shows_the_system_as_one_curve_beside_the_levels(certify, routed_model, tmp_path):
    certify(model_name_or_path=routed_model, **SETTINGS | {"sigmas": (0.25, 0.5, "auto")})
    results = read_results([tmp_path / "run"])
    assert [result.title for result in results] == [f"run, sigma = {level}" for level in (0.25, 0.5, "auto")]
    report = summarize(results, [0.0, 0.1], envelope=True)
    low, high, routed = report["results"]
    assert (low["sigma"], high["sigma"], routed["sigma"]) == (0.25, 0.5, "auto")
    assert report["envelope"]["label"] == "best of several sigmas of one model"
    for share, *single in zip(*(part["certified_accuracy"] for part in (report["envelope"], low, high))):
        assert share["share"] == max(row["share"] for row in single)
    assert routed["num_images"] == 10
    assert routed["router"]["mean_num_samples"] == 256
    text = render_report(report)
    assert "a router chooses the noise level" in text
    assert "| auto |" in text


def test_settings_that_a_router_cannot_have(routed_model):
    def settings(**options):
        return RunSettings(model_name_or_path=routed_model, dataset_name="images", **options)

    assert settings(sigmas=["0.5", "auto"]).sigmas == [0.5, "auto"]
    with pytest.raises(ValueError, match="sigma='auto' finds radii: use method two-stage or fixed"):
        settings(sigmas=["auto"], radii=[0.5])
    with pytest.raises(ValueError, match="router='r' has no meaning without sigma='auto'"):
        settings(sigmas=[0.5], router="r")


def test_a_model_without_a_router(certify, model):
    with pytest.raises(ValueError, match="has no router, which sigma='auto' needs"):
        certify(model_name_or_path=model, **SETTINGS)
