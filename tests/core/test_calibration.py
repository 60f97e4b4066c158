import json
import re

import numpy as np
import pytest
from scipy import optimize, special

from hf_smoothing import GaussianNoise, clopper_pearson_lower
from hf_smoothing.core.calibration import Calibration, compare_estimates, estimate_lower_bound
from hf_smoothing.core.lattice import SampledNoise
from hf_smoothing.core.rule_protocols import CleanPass, probabilities_proving
from hf_smoothing.core.rules import make_rule
from hf_smoothing.core.surrogate_rule import SurrogateRule

NOISE = GaussianNoise(0.5)


def claims_of(rule, frequencies, noise=NOISE):
    """What a rule claims where the head predicts these frequencies, `(images, classes)`."""
    runs, images = rule.start(noise, *frequencies.shape), np.arange(len(frequencies))
    runs.start(images, CleanPass(frequencies, frequencies=True))
    return runs.outcomes(images)


def simulate(generator, images, bias, n=1000, alpha=0.001):
    """Images of known p, their Monte-Carlo certificates, and a head that errs a good deal, now and then about the class."""
    p = generator.beta(2, 1, images)
    measured = generator.binomial(n, p)
    p_lower = clopper_pearson_lower(measured, n, alpha)
    predictions = np.where(p_lower > 0.5, 0, -1)
    guess = special.expit(special.logit(p) + generator.normal(bias, 0.7, images))
    probabilities = np.column_stack([guess, *[(1 - guess) / 9] * 9])
    mistaken = generator.random(images) < 0.02
    probabilities[mistaken] = np.roll(probabilities[mistaken], 1, axis=1)
    return probabilities, predictions, p_lower


def calibrated(predicted, allowed, n=1000, sigma=0.5):
    return Calibration({sigma: tuple(predicted)}, {sigma: tuple(allowed)}, n, 0.001, "images", "model")


@pytest.mark.parametrize("radii", [None, (0.0, 0.25, 0.5, 0.75), (0.5,)])
@pytest.mark.parametrize("bias", [-2.0, 0.3])
@pytest.mark.parametrize("delta", [0.1, 0.05])
def test_claims_exceed_what_monte_carlo_proves_about_delta_of_the_time(delta, bias, radii):
    generator = np.random.default_rng(0)
    missed, claimed, shifts = [], [], []
    for _ in range(100):
        probabilities, predictions, p_lower = simulate(generator, 150, bias)
        calibration = calibrated(
            *compare_estimates(probabilities[:100], predictions[:100], p_lower[:100], 1000, 0.001)
        )
        rule = SurrogateRule(1000, 0.001, delta, calibration, radii)
        shifts.append(rule.shift(NOISE))
        outcomes = claims_of(rule, probabilities[100:])
        small_enough = NOISE.radius(outcomes.p_lower) <= NOISE.radius(p_lower[100:])
        claims = outcomes.predictions != -1
        missed += (claims & ~((outcomes.predictions == predictions[100:]) & small_enough)).tolist()
        claimed += claims.tolist()
    # binomial error of 5,000 images in 100 groups that share a calibration: measured, not assumed
    error = np.std(np.reshape(missed, (100, 50)).mean(1)) / np.sqrt(100)
    assert np.mean(missed) <= delta + 3 * error
    assert np.mean(missed) > delta / 2  # no more cautious than need be
    assert np.mean(claimed) > (0.3 if radii != (0.5,) else 0.15)
    assert (np.median(shifts) < 0) == (bias < 0)  # too cautious a head is raised


def test_scores():
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.5, 0.5], [0.9, 0.1]])
    predictions, p_lower = np.array([0, 0, -1, 0, 0]), np.array([0.8, 0.8, 0.0, 0.8, 0.99])
    for image, (predicted, proved) in enumerate(((0.9, 0.8), (0.9, 0.5), (0.9, 0.5), (0.5, 0.8), (0.9, 0.99))):
        row = slice(image, image + 1)
        (score,) = calibrated(
            *compare_estimates(probabilities[row], predictions[row], p_lower[row], 1000, 0.001)
        ).scores(0.5)
        # Monte-Carlo predicts another class, or abstains: every claim is too large
        shifted = special.expit(special.logit(predicted) - score)
        assert estimate_lower_bound(shifted, 1000, 0.001) == pytest.approx(proved, rel=1e-9)
        assert (score > 0) == (proved < predicted)
    # Monte-Carlo proves as much as its draws can show: no estimate exceeds it
    for hits, low, high in ((1000, -np.inf, -np.inf), (999, 15, 25)):
        most = clopper_pearson_lower([hits], 1000, 0.001)
        sure = calibrated(*compare_estimates(np.array([[1.0, 0.0]]), np.array([0]), most, 1000, 0.001))
        assert low <= sure.scores(0.5)[0] <= high


def test_scores_of_radii_to_decide():
    needed = [NOISE.probability_needed(radius) for radius in (0.0, 0.25, 0.5)]
    estimates = np.array([0.76, 0.9, 0.9, 0.6, 0.99])  # claim 0.25, 0.5 (twice), 0, 0.5
    probabilities = np.stack([estimates, 1 - estimates], 1)
    predictions = np.array([0, 0, -1, 0, 0])
    p_lower = np.array([0.75, 0.75, 0.0, 0.505, 0.95])  # prove 0.25, 0.25, nothing, 0, 0.5
    for image, (claims, proves) in enumerate(((2, 2), (3, 2), (3, 0), (1, 1), (3, 3))):
        row = slice(image, image + 1)
        calibration = calibrated(*compare_estimates(probabilities[row], predictions[row], p_lower[row], 1000, 0.001))
        assert calibration.count_claimed_radii(estimates[image], 0.0, needed) == claims
        (score,) = calibration.scores(0.5, needed[::-1])  # in any order
        if proves == len(needed):
            assert score == -np.inf
            continue
        # lowered by just the score the first radius too many is no longer claimed, by less it is
        assert calibration.count_claimed_radii(estimates[image], score, needed) == proves
        assert calibration.count_claimed_radii(estimates[image], score - 1e-9, needed) == proves + 1


def noises():
    """The distribution, and pictures that take a little, or much, off its bounds."""
    return [NOISE, sampled(3 * 8 * 8), sampled(3 * 2000 * 2000)]


def sampled(coordinates):
    return SampledNoise(NOISE, coordinates)


def unshifted():
    """A calibration whose shift is 0, up to a picture's slack: all but claimed, where Monte-Carlo proves nothing."""
    just = optimize.brentq(lambda p: float(estimate_lower_bound(p, 1000, 0.001)) - 0.5, 0.5, 0.6)
    return calibrated([special.logit(just)] * 9, [0.0] * 9)


@pytest.mark.parametrize("noise", noises(), ids=["distribution", "small picture", "large picture"])
def test_what_is_claimed_shows_the_radius_asked_for_and_no_more(noise):
    rule = SurrogateRule(1000, 0.001, 0.5, unshifted(), (0.25, 0.0, 0.5))
    for estimate, prediction, radius in ((0.9, 0, 0.5), (0.76, 0, 0.25), (0.6, 0, 0.0), (0.51, -1, 0.0)):
        outcome = claims_of(rule, np.array([[estimate, 1 - estimate]]), noise)
        assert outcome.predictions == prediction
        assert radius <= noise.radius(outcome.p_lower) <= radius * (1 + 1e-12) + 1e-15
        assert (outcome.delta, outcome.calibration) == (0.5, "images; Monte-Carlo with n = 1,000")


def test_a_cautious_head_is_raised_to_what_it_can_claim():
    """A biased head costs nothing where one radius is decided, if it ranks the images right."""
    generator = np.random.default_rng(1)
    p = (1 + generator.beta(2, 1, 2000)) / 2
    p_lower = clopper_pearson_lower(generator.binomial(1000, p), 1000, 0.001)
    predictions = np.where(p_lower > 0.5, 0, -1)
    guess = special.expit(special.logit(p) - 1)
    half, rest = slice(0, 1000), slice(1000, 2000)
    probabilities = np.column_stack([guess, *[(1 - guess) / 9] * 9])
    calibration = calibrated(*compare_estimates(probabilities[half], predictions[half], p_lower[half], 1000, 0.001))
    (needed,) = probabilities_proving((0.5,), NOISE)
    assert -1.2 < calibration.shift(0.5, 0.05, [needed]) < -0.8
    proved, estimated = p_lower[rest] >= needed, estimate_lower_bound(guess[rest], 1000, 0.001) >= needed
    rule = SurrogateRule(1000, 0.001, 0.05, calibration, (0.5,))
    claimed = claims_of(rule, probabilities[rest]).predictions == 0
    assert (claimed & ~proved).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 500)
    assert estimated.mean() < proved.mean() - 0.1 < claimed.mean()


def test_a_radius_that_is_always_proved_is_always_claimed():
    calibration = calibrated([0.1] * 9, [np.inf] * 9)
    assert calibration.shift(0.5, 0.1) == -64
    assert calibration.claim_rate(0.5, 0.1) == calibration.claim_rate(0.5, 0.1, [0.9]) == 1
    for radii in (None, (0.25, 0.5)):
        rule = SurrogateRule(1000, 0.001, 0.1, calibration, radii)
        for estimate in (1e-9, 0.3, 1.0):
            outcome = claims_of(rule, np.array([[estimate, 0.0]]))
            most = NOISE.radius(float(clopper_pearson_lower(1000, 1000, 0.001))) if radii is None else 0.5
            assert outcome.predictions == 0
            assert NOISE.radius(outcome.p_lower) == pytest.approx(most)


def test_a_radius_that_no_probability_shows_does_not_undo_the_lowering():
    """A large picture's slack can ask for a probability above 1: that radius is never claimed, and never allowed."""
    noise = sampled(3 * 2000 * 2000)
    radii = (0.25, 1.5)
    needed = probabilities_proving(radii, noise)
    assert needed[1] > 1
    calibration = calibrated([2.0] * 19, [0.5] * 19)
    assert calibration.shift(0.5, 0.1, needed) == calibration.shift(0.5, 0.1, needed[:1]) > 0.5
    assert (
        calibration.count_claimed_radii(1.0, 0.0, needed) == calibration.count_claimed_radii(1.0, -64.0, needed) == 1
    )


def test_the_estimate_is_what_the_paper_says():
    at_whole_hits = estimate_lower_bound([0.987, 0.988, 1.0], 1000, 0.01)
    assert at_whole_hits == pytest.approx(clopper_pearson_lower([987, 988, 1000], 1000, 0.01), rel=1e-9)
    assert at_whole_hits[0] < estimate_lower_bound(0.9875, 1000, 0.01) < at_whole_hits[1]
    assert at_whole_hits[2] > estimate_lower_bound(0.9999, 1000, 0.01) > clopper_pearson_lower(999, 1000, 0.01)
    assert estimate_lower_bound(0.0, 1000, 0.01) < 1e-9


def test_the_quantile_is_that_of_split_conformal_prediction(tmp_path):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 20.0))
    calibration = Calibration(
        {0.25: tuple(scores + 3), 0.5: (1.0,) * 19},
        {0.25: (3.0,) * 19, 0.5: (2.0,) * 18 + (np.inf,)},
        1000,
        0.001,
        "images",
        "model",
    )
    assert calibration.shift(0.25, 0.1) == 18  # the 18th of 19: ceil(20 * 0.9)
    assert calibration.shift(0.25, 0.05) == 19
    assert calibration.shift(0.5, 0.1) == -1  # too cautious: it may be raised
    assert calibration.shifted_lower_bound(0.9, 0) == pytest.approx(float(estimate_lower_bound(0.9, 1000, 0.001)))
    assert calibration.shifted_lower_bound(0.9, 18) < 1e-3
    assert calibration.shifted_lower_bound(1.0, 18) == pytest.approx(
        float(estimate_lower_bound(1.0, 1000, 0.001)), rel=1e-3
    )
    with pytest.raises(ValueError, match="takes at least 99 images"):
        calibration.shift(0.25, 0.01)
    with pytest.raises(ValueError, match=r"sigma=1 was not calibrated, only 0\.25, 0\.5 was"):
        calibration.shift(1.0, 0.1)
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        json.dumps({"predicted": {}}),
        json.dumps({"predicted": {"0.5": [1]}, "allowed": {"0.5": [1]}}),
        json.dumps({"predicted": {"0.5": [1]}, "allowed": {}, "n": 1, "alpha": 0.1, "dataset": "", "model": ""}),
    ],
)
def test_a_file_that_holds_no_calibration(tmp_path, content):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds no calibration|one or more images"):
        Calibration.load(tmp_path / "calibration.json")


def test_settings_that_do_not_fit():
    calibration = calibrated([1.1] * 19, [1.0] * 19)
    assert make_rule("surrogate", delta=0.1, calibration=calibration).n == 1000
    for settings, message in (
        ({"delta": 0.1}, "takes a calibrated count head"),
        ({"delta": 1.5, "calibration": calibration}, "delta=1.5 must lie strictly between"),
        (
            {"delta": 0.1, "calibration": calibration, "alpha": 0.01},
            "alpha=0.01 is not that of the calibration, 0.001",
        ),
        ({"delta": 0.1, "calibration": calibration, "n": 10}, "n=10 is not that of the calibration, 1000"),
        ({"radius": 0.5}, "radii=(0.5,) have no meaning for method 'surrogate' without delta"),
        ({"radii": [0.5]}, "radii=(0.5,) have no meaning for method 'surrogate' without delta"),
        ({"delta": 0.1, "calibration": calibration, "radii": ()}, "radii=() asks for nothing"),
        ({"delta": 0.1, "calibration": calibration, "radius": -1}, "radius=-1 must be"),
        ({"max_draws": 5}, "max_draws=5 has no meaning"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_rule("surrogate", **settings)
    with pytest.raises(ValueError, match=r"delta=0\.1 has no meaning for method 'sequential'"):
        make_rule("sequential", delta=0.1)
    with pytest.raises(ValueError, match="leave them out, or give delta"):
        SurrogateRule(radii=(0.5,))
    for radii in (None, (0.25, 20.0)):  # not that 20 is out of reach
        with pytest.raises(ValueError, match="sigma=1 was not"):
            SurrogateRule(1000, 0.001, 0.1, calibration, radii).check(GaussianNoise(1.0))
    with pytest.raises(ValueError, match="sigma=1 was not"):
        make_rule("surrogate", delta=0.1, calibration=calibration).check(GaussianNoise(1.0))
    assert make_rule("surrogate", delta=0.1, calibration=calibration, radius=0.5).radii == (0.5,)
    with pytest.raises(ValueError, match=r"n=1000 draws can never certify radius 1\.5"):
        make_rule("surrogate", delta=0.1, calibration=calibration, radii=[0.5, 1.5]).check(NOISE)
