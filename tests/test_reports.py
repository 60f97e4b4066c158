import json

import pytest
from conftest import SHIPPED_MODEL
from PIL import Image
from scipy import stats

from hf_smoothing import Certificate
from hf_smoothing.reports import certified_accuracy, picture_of_certificates


def certificate(prediction, radius, guarantee="per_input"):
    return Certificate(
        prediction=prediction, radius=radius, guarantee=guarantee, method="sequential", noise="gaussian", norm="l2",
        sampling="float",
        sigma=0.25, alpha=0.001, p_lower=0.9, p_upper=0.1, counts=(3, 1), num_samples=5, seed=0, dtype="float32",
    )  # fmt: skip


def test_certified_accuracy_counts_abstentions_as_wrong():
    found = [certificate(0, 0.6), certificate(0, 0.25), certificate(1, 0.9), certificate(-1, 0.0), certificate(1, 0.0)]
    accuracy = certified_accuracy(found, [0, 0, 0, 1, 1], [0.0, 0.25, 0.5])
    assert [accuracy[radius].hits for radius in (0.0, 0.25, 0.5)] == [3, 2, 1]
    assert accuracy[0.5].share == 0.2
    assert accuracy[0.5].interval == pytest.approx((stats.beta.ppf(0.025, 1, 5), stats.beta.ppf(0.975, 2, 4)))


def test_an_abstention_is_never_right():
    assert certified_accuracy([certificate(-1, 0.0)], [-1], [0.0])[0.0].hits == 0


def test_guarantees_are_not_mixed():
    with pytest.raises(ValueError, match="none, per_input"):
        certified_accuracy([certificate(0, 0.1), certificate(0, 0.1, "none")], [0, 0], [0.0])
    with pytest.raises(ValueError, match="1 certificates for 2 labels"):
        certified_accuracy([certificate(0, 0.1)], [0, 0], [0.0])


def test_the_picture(tmp_path):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    found = [certificate(0, 0.25), certificate(-1, 0.0), certificate(1, 0.5)]
    path = tmp_path / "certificates.png"
    picture_of_certificates(pictures, found, [0, 1, 0], ["cat", "dog"], path)
    assert Image.open(path).width > 500


def test_the_shipped_results_meet_what_the_project_promises():
    results = json.loads((SHIPPED_MODEL / "results" / "demo" / "results.json").read_text())
    shares = {row["radius"]: row["share"] for row in results["certified_accuracy"]}
    assert shares[0.25] >= 0.38
    assert results["sigma"] == 0.25
    assert results["alpha"] == 0.001
