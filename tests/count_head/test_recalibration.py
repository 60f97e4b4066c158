import numpy as np
import pytest
from scipy.stats import norm

from hf_smoothing.core.bounds import clopper_pearson_lower
from hf_smoothing.core.certificates import ABSTAIN
from hf_smoothing.count_head.comparison import Comparison
from hf_smoothing.count_head.recalibration import Recalibration, recalibrate_by_halves
from hf_smoothing.count_head.resampling import (
    evaluate_estimated_share,
    evaluate_few_certificates,
    evaluate_selection,
)
from hf_smoothing.metrics.certified_accuracy.shares import share_of_sample

RADII = (0.0, 0.25, 0.5, 0.75)


def simulate(images, generator, pull=0.5, error=0.5, confused=0.2):
    """Ten classes, n = 1,000; a head whose probits are pulled to 0, with errors, and that confuses some images."""
    probits = generator.normal(1.0, 1.0, images)
    p = norm.cdf(probits)
    labels = np.zeros(images, np.int64)
    counts = np.zeros((images, 10), np.int64)
    counts[:, 0] = generator.binomial(1000, p)
    counts[:, 1] = 1000 - counts[:, 0]
    predicted = np.full((images, 10), 1e-4)
    predicted[:, 0] = norm.cdf(pull * probits + generator.normal(0, error, images))
    predicted[:, 2] = 1 - predicted[:, 0]
    mixed = generator.random(images) < confused
    predicted[mixed] = np.roll(predicted[mixed], 3, axis=1)
    predicted /= predicted.sum(1, keepdims=True)
    p_lower = clopper_pearson_lower(counts.max(1), 1000, 0.001)
    predictions = np.where(p_lower > 0.5, counts.argmax(1), ABSTAIN)
    return Comparison(0.5, predicted, counts, predictions, p_lower, labels, 0.001)


def certified_accuracy(comparison):
    estimated, certified = comparison.estimated_radii, comparison.certified_radii
    ours = (comparison.predicted_classes == comparison.labels) & (estimated > 0)
    theirs = comparison.predictions == comparison.labels
    return np.array(
        [[(ours & (estimated >= radius)).mean(), (theirs & (certified >= radius)).mean()] for radius in RADII]
    )


def test_a_recalibration_gives_other_images_the_certified_accuracy_of_monte_carlo():
    generator = np.random.default_rng(0)
    fitted, judged = simulate(4000, generator), simulate(4000, generator)
    before = certified_accuracy(judged)
    assert np.abs(before[:, 0] - before[:, 1]).max() > 0.1
    recalibrated = Recalibration.fit(fitted).apply(judged)
    after = certified_accuracy(recalibrated)
    assert after[2:, 0] == pytest.approx(after[2:, 1], abs=0.03)
    # at small radii Monte-Carlo is right more often than the head, which confuses a fifth: all that are right claim them
    assert after[:2, 0] == pytest.approx((judged.predicted_classes == judged.labels).mean(), abs=0.001)
    # a monotone map of the predictions, which changes no class
    np.testing.assert_array_equal(recalibrated.predicted_classes, judged.predicted_classes)
    assert recalibrated.probabilities.sum(1) == pytest.approx(1)
    order = np.argsort(judged.probabilities.max(1))
    clear = recalibrated.probabilities.max(1)[order]
    assert (np.diff(clear[clear > 0.5]) >= 0).all()


def test_a_head_that_is_right_too_often_claims_less():
    generator = np.random.default_rng(1)
    comparison = simulate(3000, generator, pull=2.0, error=0.1, confused=0.0)
    assert certified_accuracy(comparison)[0, 0] > certified_accuracy(comparison)[0, 1] + 0.01
    accuracy = certified_accuracy(Recalibration.fit(comparison).apply(comparison))
    assert accuracy[:, 0] == pytest.approx(accuracy[:, 1], abs=0.003)


def test_each_half_is_judged_by_the_other():
    comparison = simulate(1000, np.random.default_rng(2))
    together, halves = recalibrate_by_halves(comparison, seed=3)
    assert [len(half.labels) for half in halves] == [500, 500]
    # the certificates of one half do not matter for its own map
    order = np.random.default_rng(3).permutation(1000)
    changed = comparison.counts.copy()
    changed[order[500:]] = [600, 400, *[0] * 8]
    other, _ = recalibrate_by_halves(Comparison(**{**vars(comparison), "counts": changed}), seed=3)
    same = (other.probabilities == together.probabilities).all(1)
    assert same[order[500:]].all()
    assert not same[order[:500]].all()


def test_a_recalibration_needs_an_image_that_is_right():
    comparison = simulate(20, np.random.default_rng(2))
    with pytest.raises(ValueError, match="no image right"):
        Recalibration.fit(Comparison(**{**vars(comparison), "labels": np.full(20, 9)}))


@pytest.mark.parametrize("head", ["good", "useless", "adversarial"])
def test_few_claims_of_a_selection_are_false(head):
    comparison = simulate(1000, np.random.default_rng(4), error=0.2, confused=0.1)
    order = np.arange(1000)
    if head == "useless":
        order = np.random.default_rng(5).permutation(1000)
    elif head == "adversarial":  # surest where least is proved
        order[np.argsort(comparison.p_lower)] = np.argsort(-comparison.probabilities.max(1))
    comparison = Comparison(**{**vars(comparison), "probabilities": comparison.probabilities[order]})
    rows = evaluate_selection(comparison, [0.25, 0.5], 0.2, splits=60, seed=0)
    assert [row["radius"] for row in rows] == [0.25, 0.5]
    for row in rows:
        assert row["false_share"] <= 0.2 + 3 * row["error"]
        certified = (comparison.certified_radii >= row["radius"]).mean()
        assert row["proved"] == pytest.approx(500 * certified, rel=0.02)
        if head == "good":
            assert row["false_share"] > 0.1
            assert row["claimed"] > 50


def test_a_share_from_few_certificates_and_how_many_the_exact_interval_takes():
    generator = np.random.default_rng(6)
    right = generator.random(5000) < 0.4
    estimated = np.where(generator.random(5000) < 0.1, ~right, right)
    good = evaluate_estimated_share(right, estimated, 200, 300, seed=0)
    useless = evaluate_estimated_share(right, generator.permutation(estimated), 200, 300, seed=0)
    for row in (good, useless):
        assert row["coverage"] > 0.91
        assert row["exact"]["coverage"] > 0.93
    # the variance within the parts is that of an error of a tenth
    assert good["times_fewer"] == pytest.approx(0.24 / 0.09, rel=0.2)
    assert useless["times_fewer"] == pytest.approx(1, abs=0.15)
    assert good["share"] == right.mean()


def test_how_few_certificates_a_recalibration_takes():
    # were some classes wrong, no map could reach the accuracy of Monte-Carlo at radius 0
    comparison = simulate(2000, np.random.default_rng(7), confused=0.0)
    few, many = (evaluate_few_certificates(comparison, RADII, sample, 20, seed=0) for sample in (50, 1000))
    for kind in ("recalibrated", "post_stratified"):
        assert few[kind]["mean"] > 1.5 * many[kind]["mean"] > 0
        assert few[kind]["within"] < many[kind]["within"]
        assert few[kind]["mean"] < few[kind]["quantile_95"]


def test_images_that_a_recalibration_was_fitted_to_do_not_judge_it():
    comparison = simulate(300, np.random.default_rng(8))
    figures = evaluate_few_certificates(comparison, RADII, 100, 1, seed=9)
    order = np.random.default_rng(9).permutation(300)
    others = np.sort(order[100:])
    fitted = Recalibration.fit(comparison.select(order[:100]))
    ours, theirs = certified_accuracy(fitted.apply(comparison.select(others))).T
    assert figures["recalibrated"]["mean"] == pytest.approx(np.abs(ours - theirs).max())
    sampled = np.isin(np.arange(300), order[:100])
    gaps = []
    for radius in RADII:
        right = (comparison.predictions == comparison.labels) & (comparison.certified_radii >= radius)
        estimated = (comparison.predicted_classes == comparison.labels) & (comparison.estimated_radii >= radius)
        estimated &= comparison.estimated_radii > 0
        share = share_of_sample(right[sampled], estimated, sampled)[0]
        gaps.append(abs((300 * share - right[sampled].sum()) / 200 - right[others].mean()))
    assert figures["post_stratified"]["mean"] == pytest.approx(max(gaps))
