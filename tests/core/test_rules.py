"""What rules claim, how often they are wrong, how many draws they take, and which settings they accept."""

from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
from scipy import stats

from hf_smoothing import (
    ABSTAIN,
    FixedRule,
    GaussianNoise,
    LaplaceNoise,
    PredictRule,
    SequentialRule,
    UniformNoise,
)
from hf_smoothing.core.rule_protocols import ABSTENTION, CleanPass, Outcome
from hf_smoothing.core.rules import make_rule
from hf_smoothing.core.sequential_rule import class_weights
from hf_smoothing.diagnostics.simulation import simulate

NOISE = GaussianNoise(1.0)


def sample(rule, probabilities, generator, scores=None, noise=NOISE):
    """Run a rule on draws with known class probabilities; the outcome and the draws it took."""
    return simulate(
        rule, noise, probabilities, CleanPass(np.log(probabilities) if scores is None else scores), generator
    )


def exact_outcomes(rule, p, noise=NOISE, scores=(0.0, 0.0)):
    """
    All outcomes of a rule and their exact probabilities, where class 0 has the probability p and class 1 the rest.

    Runs with the same counts that keep the same values are merged, whatever the order of their draws.
    """
    outcomes = Counter()
    runs_after = {0: {None: [rule.start(noise, CleanPass(np.array(scores))), 1.0]}}
    while runs_after:
        draws = min(runs_after)
        for run, probability in runs_after.pop(draws).values():
            wanted = run.next_draws()
            if not wanted:
                outcomes[run.outcome()] += probability
                continue
            kept = repr([value for value in vars(run).values() if isinstance(value, list | Outcome)])
            kept += str(getattr(run, "selected", None))
            for hits, share in enumerate(stats.binom.pmf(np.arange(wanted + 1), wanted, p)):
                counts = np.zeros_like(run.counts)
                counts[:2] = hits, wanted - hits
                merged = runs_after.setdefault(draws + wanted, {})
                key = (*(run.counts + counts).tolist(), kept)
                if key not in merged:
                    merged[key] = [deepcopy(run), 0.0]
                    merged[key][0].update(counts)
                merged[key][1] += probability * share
    assert sum(outcomes.values()) == pytest.approx(1)
    return outcomes


def wrong_share(rule, p, is_wrong=None, **kwargs):
    """The probability that the rule certifies class 0 beyond its true probability p."""
    # two classes: p_upper says the same
    is_wrong = is_wrong or (lambda outcome: outcome.prediction == 0 and outcome.p_lower > p)
    return sum(share for outcome, share in exact_outcomes(rule, p, **kwargs).items() if is_wrong(outcome))


def at_most(alpha, runs):
    return alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)


@pytest.mark.parametrize("p", [0.55, 0.841])
def test_fixed_is_wrong_at_most_alpha(p):
    # more than 0.01: the test has something to see
    assert 0.01 < wrong_share(FixedRule(n0=10, n=100, alpha=0.05), p) <= 0.05


@pytest.mark.parametrize("below", [0.0, 0.003])
def test_deciding_a_radius_is_wrong_at_most_alpha(below):
    """p at and just under the threshold, where a wrong claim is likeliest."""
    threshold = NOISE.probability_needed(1.0)
    rule = SequentialRule(radii=(1.0,), alpha=0.05, max_draws=100)
    assert 0.01 < wrong_share(rule, threshold - below, lambda outcome: outcome.p_lower >= threshold) <= 0.05


def test_deciding_several_radii_is_wrong_at_most_alpha_together():
    p = NOISE.probability_needed(0.5) - 1e-9  # 0.25 is true, 0.5 and 1 are false
    rule = SequentialRule(radii=(0.25, 0.5, 1.0), alpha=0.05, max_draws=50)
    assert 0.01 < wrong_share(rule, p) <= 0.05


def test_finding_the_radius_is_wrong_at_most_alpha():
    rule = SequentialRule(alpha=0.05, max_draws=200, tolerance=0.2)
    assert 0.001 < wrong_share(rule, 0.9) <= 0.05


@pytest.mark.parametrize("noise", [UniformNoise(1.0), LaplaceNoise(1.0)], ids=lambda noise: noise.name)
@pytest.mark.parametrize(
    "rule",
    [
        FixedRule(n0=10, n=100, alpha=0.05),
        SequentialRule(radii=(0.5,), alpha=0.05, max_draws=60),
        SequentialRule(radii=(0.2, 0.5, 0.8), alpha=0.05, max_draws=40),
        SequentialRule(alpha=0.05, max_draws=100, tolerance=0.2),
    ],
    ids=["fixed", "one radius", "radii", "find"],
)
def test_every_rule_is_wrong_at_most_alpha_with_other_noise_too(noise, rule):
    """p just under what radius 0.5 takes; a claim stands once made, so this judges the best of all looks."""
    p = noise.probability_needed(0.5) - 1e-9
    wrong = wrong_share(
        rule,
        p,
        lambda outcome: outcome.prediction == 0 and noise.radius(outcome.p_lower, outcome.p_upper) >= 0.5,
        noise=noise,
    )
    assert 0 < wrong <= 0.05


def test_predicting_a_class_that_is_not_the_likeliest_happens_at_most_alpha():
    """Two equally likely classes: any prediction but the first is wrong."""
    rule = PredictRule(n=60, alpha=0.05)
    assert 0.01 < wrong_share(rule, 0.5, lambda outcome: outcome.prediction == 1) <= 0.05


@pytest.mark.parametrize("scores", [np.arange(10.0), -np.arange(10.0)], ids=["misleading", "right"])
def test_all_classes_share_one_alpha(scores):
    """Two equally likely classes of ten, ranked last or first on the clean image: a claim for either is wrong."""
    rule = SequentialRule(radii=(0.0,), alpha=0.05, max_draws=100)
    share = wrong_share(rule, 0.5, lambda outcome: outcome.prediction != ABSTAIN, scores=scores)
    assert share <= 0.05
    assert share > 0.005 or scores[-1] > 0  # ranked first they hold most of alpha, and there is something to see


FIVE = np.array([0.5, 0.2, 0.1, 0.1, 0.1])
TRUE_RADIUS = NOISE.radius(0.5, 0.2)  # from the lower bound alone nothing at all could be claimed


def test_bounding_the_runner_up_is_wrong_at_most_alpha():
    """A radius just above the true one, which only the bound of the runner-up could (wrongly) show."""
    generator = np.random.default_rng(0)
    runs = 600
    rule = SequentialRule(radii=(TRUE_RADIUS + 1e-9,), alpha=0.05, max_draws=200)
    outcomes = [sample(rule, FIVE, generator)[0] for _ in range(runs)]
    assert np.mean([NOISE.radius(outcome.p_lower, outcome.p_upper) > TRUE_RADIUS for outcome in outcomes]) <= at_most(
        0.05, runs
    )
    # and with the classes in doubt, so that claims for several of them compete
    two = np.array([0.35, 0.35, 0.1, 0.1, 0.1])
    outcomes = [
        sample(SequentialRule(radii=(0.0,), alpha=0.05, max_draws=200), two, generator)[0] for _ in range(runs)
    ]
    assert np.mean([outcome.prediction != ABSTAIN for outcome in outcomes]) <= at_most(0.05, runs)


def test_bounding_the_runner_up_certifies_what_the_lower_bound_alone_cannot():
    outcome, taken = sample(SequentialRule(radii=(0.7 * TRUE_RADIUS,)), FIVE, np.random.default_rng(0))
    assert outcome.prediction == 0
    assert outcome.p_lower < 0.5 < 1 - outcome.p_upper
    assert NOISE.radius(outcome.p_lower, outcome.p_upper) >= 0.7 * TRUE_RADIUS
    assert taken < 4_000
    outcome, _ = sample(SequentialRule(tolerance=0.2, max_draws=50_000), FIVE, np.random.default_rng(1))
    assert 0.7 * TRUE_RADIUS < NOISE.radius(outcome.p_lower, outcome.p_upper) < TRUE_RADIUS


@pytest.mark.parametrize(("radius", "p", "most"), [(0.5, 0.9, 1.3), (1.0, 0.95, 1.3), (2.0, 0.999, 1.3)])
def test_deciding_takes_little_more_than_walds_bound(radius, p, most):
    p0 = NOISE.probability_needed(radius)
    divergence = p * np.log(p / p0) + (1 - p) * np.log((1 - p) / (1 - p0))
    generator = np.random.default_rng(0)
    rule = SequentialRule(radii=(radius,), max_draws=100_000)
    probabilities = np.array([p, *[(1 - p) / 9] * 9])
    runs = [sample(rule, probabilities, generator) for _ in range(400)]
    assert np.mean([NOISE.radius(outcome.p_lower, outcome.p_upper) >= radius for outcome, _ in runs]) > 0.97
    assert np.mean([taken for _, taken in runs]) <= most * np.log(1000) / divergence


def test_a_hopeless_radius_is_given_up_early_and_the_best_so_far_is_kept():
    generator = np.random.default_rng(0)
    rule = SequentialRule(radii=(0.5, 2.0), max_draws=100_000)
    outcome, taken = sample(rule, np.array([0.8, 0.2]), generator)
    assert outcome.prediction == 0
    assert NOISE.probability_needed(0.5) <= outcome.p_lower < 0.8
    assert taken < 1000


def test_a_claim_stands_when_later_draws_speak_less_clearly():
    run = SequentialRule(radii=(0.5, 1.0)).start(NOISE, CleanPass(np.zeros(2)))
    while run.outcome().prediction != 0:
        run.update(np.array([run.next_draws(), 0]))
    claimed = run.outcome()
    assert NOISE.radius(claimed.p_lower) >= 0.5
    while draws := run.next_draws():
        run.update(np.array([draws // 2, draws - draws // 2]))
    assert run.outcome() == claimed


def test_two_equal_classes_end_in_abstention():
    outcome, taken = sample(SequentialRule(max_draws=1000), np.array([0.35, 0.35, 0.3]), np.random.default_rng(0))
    assert outcome == ABSTENTION
    assert taken < 1000  # the remaining draws cannot change it


@pytest.mark.parametrize(("classes", "top"), [(10, 0.5), (1000, 0.3)])
def test_a_top_class_far_below_the_threshold_of_the_lower_bound(classes, top):
    """There the evidence underflows; the bound of the runner-up may still show the radius."""
    probabilities = np.full(classes, (1 - top) / (classes - 1))
    probabilities[0] = top
    for seed in range(5):
        outcome, _ = sample(SequentialRule(radii=(1.1,), max_draws=5000), probabilities, np.random.default_rng(seed))
        assert outcome.prediction in (0, ABSTAIN)


def test_the_radius_is_found_to_the_tolerance():
    generator = np.random.default_rng(0)
    for tolerance in (0.05, 0.2):
        outcome, taken = sample(
            SequentialRule(tolerance=tolerance, max_draws=100_000), np.array([0.95, 0.05]), generator
        )
        assert (1 - tolerance) * NOISE.radius(0.95) * 0.95 < NOISE.radius(outcome.p_lower) < NOISE.radius(0.95)
        assert taken < 100_000


def test_fixed_takes_its_draws_and_does_not_count_the_selection():
    run = FixedRule(n0=10, n=50).start(NOISE, CleanPass(np.zeros(2)))
    assert run.next_draws() == 10
    run.update(np.array([0, 10]))
    assert run.next_draws() == 50
    run.update(np.array([40, 10]))
    assert run.next_draws() == 0
    assert run.counts.tolist() == [40, 10]
    assert run.outcome().prediction == ABSTAIN  # class 1 was chosen, and is not the majority


def test_class_weights():
    weights = class_weights(np.array([0.0, 5.0, 1.0, -1.0]), 0.05)
    assert weights.sum() == pytest.approx(1)
    assert weights.argsort().tolist() == [3, 0, 2, 1]
    assert weights.min() >= 0.05 / 4
    np.testing.assert_array_equal(class_weights(np.zeros(3), 0.05), class_weights(np.zeros(3), 0.05))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method='magic'"),
        ({"method": "fixed", "alpha": 0.0}, "alpha=0.0"),
        ({"method": "sequential", "alpha": 1.5}, "alpha=1.5"),
        ({"method": "fixed", "n": 0}, "n=0"),
        ({"method": "fixed", "n": 1e2}, "n=100.0 must be a whole number"),
        ({"method": "sequential", "max_draws": float("nan")}, "max_draws=nan"),
        ({"method": "sequential", "alpha": "0.1"}, "alpha='0.1'"),
        ({"method": "sequential", "radius": "0.5"}, "radius='0.5'"),
        ({"method": "sequential", "radii": 0.5}, "radii=0.5 must be a list"),
        ({"method": "fixed", "radii": (-1, 0.2)}, "radius=-1"),
        ({"method": "sequential", "max_draws": 0}, "max_draws=0"),
        ({"method": "sequential", "radius": -1.0}, "radius=-1.0"),
        ({"method": "sequential", "radius": float("nan")}, "radius=nan"),
        ({"method": "sequential", "radii": ()}, "radii=()"),
        ({"method": "sequential", "radius": 1.0, "radii": (1.0,)}, "not both"),
        ({"method": "sequential", "n0": 5}, "n0=5"),
        ({"method": "sequential", "tolerance": 0.0}, "tolerance=0.0"),
        ({"method": "sequential", "tolerance": 0.1, "radius": 1.0}, "tolerance=0.1"),
        ({"method": "fixed", "tolerance": 0.1}, "tolerance=0.1"),
        ({"method": "fixed", "n": 7, "max_draws": 6}, "n=7 exceeds max_draws=6"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=r".") as caught:
        make_rule(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["fixed", "sequential"])
@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_too_few_draws_for_the_radius_are_refused_with_the_number_it_takes(method, radius):
    with pytest.raises(ValueError, match="can never certify radius") as caught:
        make_rule(method, radius=radius, max_draws=10).check(NOISE)
    needed = int(str(caught.value).split("at least ")[1].split(" draws")[0].replace(",", ""))
    make_rule(method, radius=radius, max_draws=needed).check(NOISE)
    with pytest.raises(ValueError, match="can never certify"):
        make_rule(method, radius=radius, max_draws=needed - 1).check(NOISE)
    run = make_rule(method, radius=radius, max_draws=needed + 5).start(NOISE, CleanPass(np.zeros(1)))
    while draws := run.next_draws():
        run.update(np.array([draws]))
    assert NOISE.radius(run.outcome().p_lower) >= radius


def test_too_few_draws_to_predict():
    with pytest.raises(ValueError, match="n=5 draws always abstain"):
        PredictRule(n=5).check(NOISE)
    PredictRule(n=11).check(NOISE)
