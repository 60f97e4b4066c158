"""Reports on a random sample of images, completed by a count head's estimates for all."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.finished_runs import rows, write_run

from hf_smoothing.metrics.certified_accuracy.shares import share_of_sample
from hf_smoothing.reporting.estimates import complete
from hf_smoothing.reporting.report import other_rows, render_notes, share_rows, summarize
from hf_smoothing.reporting.results import read_results


def change_run(folder, keep=None, **settings):
    """Change settings of a finished run, and keep only some of its images."""
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= settings
    (folder / "run.json").write_text(json.dumps(run))
    table = pq.read_table(folder / "certificates.parquet")
    pq.write_table(table if keep is None else table.take(keep), folder / "certificates.parquet")
    return folder


@pytest.fixture
def sample(tmp_path):
    """Twenty of 60 images, the one that failed among them."""
    return change_run(write_run(tmp_path / "sample"), keep=list(range(2, 60, 3)), max_samples_at_random=True)


@pytest.fixture
def estimates(tmp_path):
    return write_run(tmp_path / "estimates", guarantee="none", seed=1)


def test_a_report_on_all_images(sample, estimates):
    report = summarize(complete(read_results([sample]), estimates), [0, 0.25])
    (entry,) = report["results"]
    assert (entry["num_images"], entry["num_sampled"], entry["num_failed"]) == (60, 20, 1)
    assert entry["guarantee"] == "per_input"
    certified = {row["index"]: row for row in rows(sample)}
    everything = rows(estimates)
    for share in entry["certified_accuracy"]:
        reached, estimated = (
            [row.get("prediction") == row["label"] and row["radius"] >= share["radius"] for row in table]
            for table in (certified.values(), everything)
        )
        assert share["right"] == sum(reached)
        assert share["estimated_share"] == sum(estimated) / 60
        arrays = (reached, estimated, [row["index"] in certified for row in everything])
        wanted, interval = share_of_sample(*map(np.array, arrays))
        assert (share["share"], share["interval_95"]) == (wanted, interval)
    assert f"{share['share']:.1%}" in share_rows(report)[0]["r = 0.25"]
    assert other_rows(report)[0]["images"] == "20"
    notes = render_notes(report)
    assert "20 of 60 images, drawn at random, were certified. The shares are about all 60" in notes
    assert "Net of alpha" not in notes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_samples_at_random": False}, "not a random sample. Certify with --max-samples, without --streaming"),
        ({"model_weights": "b"}, "has estimates for model_weights=None, but sample, sigma = 0.25 has 'b'"),
        ({"split": "train"}, "estimates for split=None, but"),
    ],
)
def test_estimates_of_something_else_are_refused(sample, estimates, settings, said):
    change_run(sample, **settings)
    with pytest.raises(ValueError, match=said):
        complete(read_results([sample]), estimates)


def test_estimates_cover_the_sample(sample, estimates, tmp_path):
    with pytest.raises(ValueError, match=r"has no estimates for sigma = 0.25"):
        complete(read_results([sample]), write_run(tmp_path / "other", sigmas=(0.5,)))
    with pytest.raises(ValueError, match="lacks an estimate for image 1180"):
        complete(read_results([sample]), change_run(estimates, keep=list(range(59))))
