"""Runs with sigma `auto`: records, resuming, reports."""

import json

import pytest
from helpers.finished_runs import rows

from hf_smoothing.core.agreement import ALPHA_SHARES
from hf_smoothing.core.noise import GaussianNoise
from hf_smoothing.core.two_stage_rule import TwoStageRule
from hf_smoothing.reporting.report import render_report, summarize
from hf_smoothing.reporting.results import read_results
from hf_smoothing.runs.settings import RunSettings

SETTINGS = {
    "sigmas": (0.25, "auto"),
    "levels": (0.5, 0.25),
    "agreement": 0.6,
    "every": 20,
    "draws": 40,
    "max_draws": 300,
}


def test_records_of_a_run_with_a_fallback(certify, tmp_path):
    summary = certify(**SETTINGS)
    assert summary.num_records == 20
    records = rows(tmp_path / "run")
    assert [row["level_choice"] is None for row in records] == [True] * 10 + [False] * 10
    assert [row["index"] for row in records] == [*range(0, 200, 20)] * 2
    for row in records[10:]:
        choice = row["level_choice"]
        assert choice["levels"] == [0.5, 0.25]
        assert choice["agreement"] == 0.6
        assert row["sigma"] in choice["levels"]
        assert sum(choice["alphas"]) == pytest.approx(row["alpha"])
        assert sum(choice["num_samples"]) == row["num_samples"]
        assert (row["prediction"] == -1) == (row["radius"] == 0)
        assert row["radius"] <= max(choice["radius"], min(choice["radii"]))
    assert {row["sigma"] for row in records[10:]} == {0.25, 0.5}
    assert any(row["radius"] > 0 for row in records[10:])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["sigmas"] == [0.25, "auto"]
    assert run["settings"]["levels"] == [0.5, 0.25]


def test_a_run_with_a_fallback_resumes_with_the_same_records(certify, tmp_path):
    certify(**SETTINGS)
    expected = rows(tmp_path / "run")
    shard = tmp_path / "run/shards/records-rank00000.jsonl"
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[:14]))
    (tmp_path / "run/certificates.parquet").unlink()
    assert certify(**SETTINGS, batch_size=7).num_new == 6
    assert rows(tmp_path / "run") == expected
    with pytest.raises(ValueError, match=r"other settings \(agreement: 0\.6 -> 0\.8\)"):
        certify(**SETTINGS | {"agreement": 0.8})


def test_a_report_shows_the_classifier_as_one_curve_beside_the_levels(certify, tmp_path):
    certify(**SETTINGS | {"sigmas": (0.25, 0.5, "auto")})
    results = read_results([tmp_path / "run"])
    assert [result.title for result in results] == [f"run, sigma = {level}" for level in (0.25, 0.5, "auto")]
    rule = TwoStageRule(draws=40, max_draws=300, alpha=ALPHA_SHARES[0] * 0.001)
    assert results[2].largest_radius == pytest.approx(rule.largest_radius(GaussianNoise(0.5)))
    report = summarize(results, [0.0, 0.1], envelope=True)
    low, high, both = report["results"]
    assert (low["sigma"], high["sigma"], both["sigma"]) == (0.25, 0.5, "auto")
    assert report["envelope"]["label"] == "best of several sigmas of one model"
    for share, *single in zip(*(part["certified_accuracy"] for part in (report["envelope"], low, high))):
        assert share["share"] == max(row["share"] for row in single)
    assert both["num_images"] == 10
    assert low["fallback"] is None
    used = [row for row in results[2].rows if row["sigma"] == 0.25]
    assert both["fallback"]["fallback_share"] == len(used) / 10 > 0
    assert both["fallback"]["draws_over_level"] >= 1
    text = render_report(report)
    assert "Where more than 60.0% of the noisy copies at sigma 0.5 agree" in text
    assert "| auto |" in text


def test_an_image_that_fails_has_a_record_at_auto_too(certify, demo_images, tmp_path):
    images = demo_images.select(range(3)).cast_column("image", demo_images.features["image"])
    folder = tmp_path / "images.parquet"
    table = images.with_format("arrow")[:].to_pylist()
    table[1]["image"] = {"bytes": b"no picture", "path": None}
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(table).replace_schema_metadata(None), folder)
    certify(dataset_name=str(folder), **SETTINGS | {"sigmas": ("auto",), "every": 1})
    failed = rows(tmp_path / "run")[1]
    assert failed["error"]
    assert failed["sigma"] is None
    assert failed["level_choice"]["levels"] == [0.5, 0.25]
    (result,) = read_results([tmp_path / "run"])
    assert (result.sigma, len(result.rows)) == ("auto", 3)


def test_settings_of_a_fallback(model):
    def settings(**options):
        return RunSettings(model_name_or_path=model, dataset_name="images", **options)

    defaults = settings(sigmas=["0.5", "auto"])
    assert (defaults.sigmas, defaults.levels, defaults.agreement) == ([0.5, "auto"], [0.5, 0.12], 0.5)
    alone = settings(sigmas=[0.5])
    assert (alone.levels, alone.agreement) == (None, None)
    with pytest.raises(ValueError, match="sigma='auto' finds radii: use method two-stage or fixed"):
        settings(sigmas=["auto"], radii=[0.5])
    with pytest.raises(ValueError, match=r"agreement=0\.7 has no meaning without sigma='auto'"):
        settings(sigmas=[0.5], agreement=0.7)
    with pytest.raises(ValueError, match="max_draws=20 draws can never certify radius 0"):
        settings(sigmas=["auto"], max_draws=20)  # at a tenth of alpha, which the fallback level has
    assert settings(sigmas=[0.5], max_draws=20).max_draws == 20
    with pytest.raises(ValueError, match="must be two noise levels"):
        settings(sigmas=["auto"], levels=[0.5])


def test_records_of_older_versions_are_read(certify, tmp_path):
    """They have the column `routing`, which is null without a router, in place of `level_choice`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    certify(every=40)
    table = tmp_path / "run/certificates.parquet"
    read = pq.read_table(table).drop_columns("level_choice")
    pq.write_table(read.append_column("routing", pa.nulls(len(read), pa.struct({"sigma": pa.float64()}))), table)
    (result,) = read_results([tmp_path / "run"])
    assert (result.sigma, len(result.rows)) == (0.25, 5)
    assert summarize([result])["results"][0]["fallback"] is None
