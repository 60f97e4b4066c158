from dataclasses import replace

import numpy as np
import pytest
from scipy import special

from hf_smoothing import GaussianNoise, clopper_pearson_lower
from hf_smoothing.core.calibration import Calibration
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.core.surrogate_rule import SurrogateRule
from hf_smoothing.count_head.comparison import Comparison
from hf_smoothing.count_head.evaluation import (
    compute_errors,
    evaluate_calibration,
    evaluate_random_splits,
    expect_accuracy,
)

N, ALPHA = 1000, 0.001
NOISE = GaussianNoise(0.5)


def simulated(images=400, bias=0.0, spread=0.5, classes=3, seed=0):
    """Images of known frequencies, what Monte-Carlo certifies of them, and a head that errs by `spread` log-odds."""
    generator = np.random.default_rng(seed)
    frequencies = generator.dirichlet([3.0, 1.0, 0.5], images)
    counts = np.array([generator.multinomial(N, one) for one in frequencies])
    bounds = clopper_pearson_lower(counts.max(1), N, ALPHA)
    guess = np.log(frequencies + 1e-9) * (1 + bias) + generator.normal(0, spread, frequencies.shape)
    return Comparison(
        0.5,
        special.softmax(guess, axis=1),
        counts,
        np.where(bounds > 0.5, counts.argmax(1), -1),
        np.where(bounds > 0.5, bounds, 0.0),
        generator.integers(0, classes, images),
        ALPHA,
    )


def test_errors_by_hand():
    counts = np.array([[900, 100], [300, 700], [520, 480], [990, 10]])
    bounds = clopper_pearson_lower(counts.max(1), N, ALPHA)
    one = Comparison(
        0.5,
        np.array([[0.95, 0.05], [0.8, 0.2], [0.45, 0.55], [0.7, 0.3]]),
        counts,
        np.array([0, 1, -1, 0]),
        np.where(bounds > 0.5, bounds, 0.0),
        np.array([0, 1, 0, 0]),
        ALPHA,
    )
    radius = one.compute_radii(clopper_pearson_lower([900, 700, 520, 990, 950, 800, 550, 700], N, ALPHA))
    found = compute_errors(one, (0.0, 0.25, 0.5), bins=2)
    assert found["disagreement"] == 0.5  # the second and the third image
    assert radius[2] == 0.0  # 520 of 1000 show nothing
    assert radius[6] > 0  # 550 would
    assert found["overestimated"] == 0.75
    # of the images with another class, or none, all that is claimed is too much
    assert found["mean_excess"] == pytest.approx(np.mean([radius[4] - radius[0], radius[5], radius[6]]))
    assert found["underestimated"] == 0.25
    assert found["mean_shortfall"] == pytest.approx(radius[3] - radius[7])
    # the head names another class, and claims less than Monte-Carlo proves for its own
    missed = replace(one, probabilities=np.array([[0.3, 0.7], [0.3, 0.7], [0.55, 0.45], [0.49, 0.51]]))
    assert compute_errors(missed, (0.0,))["underestimated"] == 0.25
    accuracy = {name: {row["radius"]: row["share"] for row in rows} for name, rows in found["accuracy"].items()}
    assert accuracy["monte_carlo"] == {0.0: 0.75, 0.25: 0.5, 0.5: 0.5}
    assert accuracy["estimate"][0.0] == 0.5
    assert sum(row["images"] for row in found["by_radius"]) == 4
    for share in ("overestimated", "underestimated"):
        assert sum(row[share] * row["images"] for row in found["by_radius"]) == pytest.approx(4 * found[share])
    assert found["by_radius"][0]["up_to"] == 0  # where Monte-Carlo proves nothing
    assert [row["predicted"] for row in found["calibration_curve"]] == pytest.approx([0.625, 0.875])
    assert [row["measured"] for row in found["calibration_curve"]] == pytest.approx(
        [(0.48 + 0.99) / 2, (0.3 + 0.9) / 2]
    )


@pytest.mark.parametrize("delta", [0.1, 0.05])
@pytest.mark.parametrize("bias", [0.0, 0.5])
@pytest.mark.parametrize("decided", [None, (0.25, 0.5)])
def test_over_random_splits_at_most_delta_are_missed(delta, bias, decided):
    found = evaluate_random_splits(simulated(bias=bias), delta, (0.0, 0.25, 0.5), splits=100, decided=decided)
    assert found["miss_rate"] <= delta + 2 * found["binomial_error"] / np.sqrt(10)
    assert found["miss_rate"] > delta / 3
    shares = [row["share"] for row in found["accuracy"]]
    assert shares == sorted(shares, reverse=True)


def test_a_head_that_is_right_loses_little():
    exact, vague = simulated(spread=0.0), simulated(spread=1.0)
    found = {
        name: evaluate_random_splits(one, 0.05, (0.25,), splits=50)["accuracy"][0]["share"]
        for name, one in (("exact", exact), ("vague", vague))
    }
    best = compute_errors(exact, (0.25,))["accuracy"]["monte_carlo"][0]["share"]
    assert found["vague"] < found["exact"] <= best
    assert found["exact"] > best - 0.1


def test_deciding_a_few_radii_takes_less_lowering_than_claiming_every_images_own():
    radii, head = (0.25, 0.5), simulated(spread=0.6)
    own, decided = (evaluate_random_splits(head, 0.05, radii, splits=50, decided=which) for which in (None, radii))
    for own_share, decided_share in zip(own["accuracy"], decided["accuracy"]):
        assert decided_share["share"] > 1.2 * own_share["share"]


@pytest.mark.parametrize("bias", [0.0, -0.3])
@pytest.mark.parametrize("radii", [None, (0.25, 0.5), (0.25,)])
def test_the_engine_claims_what_is_counted_here(bias, radii):
    head = simulated(bias=bias)
    rows, calibration = (
        head.select(np.arange(200)),
        Calibration(
            *({0.5: column} for column in head.select(np.arange(200, 400)).to_calibration()),
            N,
            ALPHA,
            "the others",
            "",
        ),
    )
    rule = SurrogateRule(N, ALPHA, 0.05, calibration, radii)
    runs, images = rule.start(NOISE, *rows.probabilities.shape), np.arange(len(rows.probabilities))
    runs.start(images, CleanPass(rows.probabilities, frequencies=True))
    claims = runs.outcomes(images)
    claimed = NOISE.radius(claims.p_lower)
    right = claims.predictions == rows.labels
    found = evaluate_calibration(rows, calibration, 0.05, (0.25,), decided=radii)
    proved = (rows.predictions == rows.predicted_classes) & (rows.certified_radii >= 0.25)
    for name, shares in (("accuracy", right), ("proved_accuracy", right & proved)):
        assert found[name][0]["share"] == (shares & (claimed >= 0.25)).mean() > 0
    answered = claims.predictions >= 0
    assert found["claim_rate"] == answered.mean()
    too_much = claimed > np.where(rows.predictions == rows.predicted_classes, rows.certified_radii, 0)
    assert found["miss_rate"] == (answered & (too_much | (rows.predictions != rows.predicted_classes))).mean() > 0


def test_what_more_draws_can_be_expected_to_certify():
    """Beside what they do certify, of images whose frequencies are known."""
    generator = np.random.default_rng(3)
    frequencies = generator.dirichlet([3.0, 1.0, 0.5], 1500)
    few = np.array([generator.multinomial(200, one) for one in frequencies])
    labels = frequencies.argmax(1)
    bounds = clopper_pearson_lower(few.max(1), 200, ALPHA)
    one = Comparison(0.5, frequencies, few, few.argmax(1), bounds, labels, ALPHA)
    many = generator.binomial(5000, frequencies.max(1))
    radii = one.compute_radii(clopper_pearson_lower(many, 5000, ALPHA))
    found = expect_accuracy(one, 5000, (0.0, 0.25, 0.5, 0.75, 1.0))
    for row, claimed in zip(found["monte_carlo"], found["estimate"]):
        measured = np.mean((radii >= row["radius"]) & (radii > 0))
        # the posterior's prior is not that of these images: a point more than chance
        assert abs(row["share"] - measured) < 3 * row["deviation"] + 0.01
        assert abs(claimed["share"] - measured) < 0.02  # a head that is right
        assert 0 < row["deviation"] < 0.015
    fewer = compute_errors(one, (0.5,))["accuracy"]["monte_carlo"][0]["share"]
    assert fewer < found["monte_carlo"][2]["share"] - 0.03
