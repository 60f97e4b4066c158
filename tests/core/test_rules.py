"""What rules claim, how often they are wrong, how many draws they take, and which settings they accept."""

from copy import copy

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
from hf_smoothing.core.rule_protocols import CleanPass, Outcomes
from hf_smoothing.core.rules import make_rule
from hf_smoothing.core.sequential_rule import class_weights
from hf_smoothing.diagnostics.simulation import simulate

NOISE = GaussianNoise(1.0)


def sample(rule, probabilities, generator, scores=None, noise=NOISE, images=1):
    """Run a rule on images whose draws have known class probabilities; the outcomes and the draws they took."""
    scores = np.log(probabilities) if scores is None else scores
    rows = np.tile(np.asarray(probabilities, np.float64), (images, 1))
    return simulate(rule, noise, rows, CleanPass(np.tile(scores, (images, 1))), generator)


SHARED = ("radii", "steps", "log_weights_upper")
"""Arrays of runs that all rows share."""


def get_state(runs, rows):
    """Copies of the arrays of runs that have one element per row."""
    arrays = {
        name: value for name, value in vars(runs).items() if isinstance(value, np.ndarray) and name not in SHARED
    }
    if hasattr(runs, "best"):
        arrays |= {f"best.{name}": value for name, value in vars(runs.best).items() if value is not None}
    return {name: value[rows] for name, value in arrays.items()}


def with_state(runs, state):
    runs = copy(runs)
    best = {name.removeprefix("best."): value for name, value in state.items() if name.startswith("best.")}
    vars(runs).update({name: value for name, value in state.items() if not name.startswith("best.")})
    if best:
        runs.best = Outcomes(**best)
    return runs


def merge(states):
    """Join rows of `(state, wanted, shares)`, and add up the shares of equal rows."""
    names = states[0][0]
    state = {name: np.concatenate([part[0][name] for part in states]) for name in names}
    wanted, shares = (np.concatenate([part[place] for part in states]) for place in (1, 2))
    table = np.column_stack([wanted, *(value.reshape(len(wanted), -1) for value in state.values())])
    _, first, group = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return {name: value[first] for name, value in state.items()}, wanted[first], np.bincount(group.ravel(), shares)


def exact_outcomes(rule, p, noise=NOISE, scores=(0.0, 0.0)):
    """
    All outcomes of a rule and their exact probabilities, where class 0 has the probability p and class 1 the rest.

    Runs that keep the same values are merged, whatever the order of their draws.
    """
    runs = rule.start(noise, 1, len(scores))
    wanted = runs.start(np.array([0]), CleanPass(np.array([scores], np.float64)))
    states = {0: [(get_state(runs, np.array([0])), wanted, np.ones(1))]}
    outcomes, total = [], 0.0
    while states:
        draws = min(states)
        state, wanted, shares = merge(states.pop(draws))
        ended = np.flatnonzero(wanted == 0)
        found = with_state(runs, state).outcomes(ended)
        outcomes.append((found, shares[ended]))
        total += shares[ended].sum()
        for number in set(wanted[wanted > 0].tolist()):
            hits = np.arange(number + 1)
            before = np.flatnonzero(wanted == number)
            parents = np.repeat(before, number + 1)
            counts = np.zeros((len(parents), len(scores)), np.int64)
            counts[:, 0] = np.tile(hits, len(before))
            counts[:, 1] = number - counts[:, 0]
            rows = np.arange(len(parents))
            after = with_state(runs, {name: value[parents] for name, value in state.items()})
            following = after.update(rows, counts)
            likely = shares[parents] * np.tile(stats.binom.pmf(hits, number, p), len(before))
            states.setdefault(draws + number, []).append((get_state(after, rows), following, likely))
    assert total == pytest.approx(1)
    return outcomes


def wrong_share(rule, p, is_wrong=None, **kwargs):
    """The probability that the rule certifies class 0 beyond its true probability p."""
    # two classes: p_upper says the same
    is_wrong = is_wrong or (lambda outcomes: (outcomes.predictions == 0) & (outcomes.p_lower > p))
    return sum(shares[is_wrong(outcomes)].sum() for outcomes, shares in exact_outcomes(rule, p, **kwargs))


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
    assert 0.01 < wrong_share(rule, threshold - below, lambda outcomes: outcomes.p_lower >= threshold) <= 0.05


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
        lambda outcomes: (outcomes.predictions == 0) & (outcomes.radii >= 0.5),
        noise=noise,
    )
    assert 0 < wrong <= 0.05


def test_predicting_a_class_that_is_not_the_likeliest_happens_at_most_alpha():
    """Two equally likely classes: any prediction but the first is wrong."""
    rule = PredictRule(n=60, alpha=0.05)
    assert 0.01 < wrong_share(rule, 0.5, lambda outcomes: outcomes.predictions == 1) <= 0.05


@pytest.mark.parametrize("scores", [np.arange(10.0), -np.arange(10.0)], ids=["misleading", "right"])
def test_all_classes_share_one_alpha(scores):
    """Two equally likely classes of ten, ranked last or first on the clean image: a claim for either is wrong."""
    rule = SequentialRule(radii=(0.0,), alpha=0.05, max_draws=100)
    share = wrong_share(rule, 0.5, lambda outcomes: outcomes.predictions != ABSTAIN, scores=scores)
    assert share <= 0.05
    assert share > 0.005 or scores[-1] > 0  # ranked first they hold most of alpha, and there is something to see


FIVE = np.array([0.5, 0.2, 0.1, 0.1, 0.1])
TRUE_RADIUS = NOISE.radius(0.5, 0.2)  # from the lower bound alone nothing at all could be claimed


def test_bounding_the_runner_up_is_wrong_at_most_alpha():
    """A radius just above the true one, which only the bound of the runner-up could (wrongly) show."""
    generator = np.random.default_rng(0)
    runs = 4000
    rule = SequentialRule(radii=(TRUE_RADIUS + 1e-9,), alpha=0.05, max_draws=200)
    outcomes, _ = sample(rule, FIVE, generator, images=runs)
    assert np.mean(outcomes.radii > TRUE_RADIUS) <= at_most(0.05, runs)
    # and with the classes in doubt, so that claims for several of them compete
    two = np.array([0.35, 0.35, 0.1, 0.1, 0.1])
    outcomes, _ = sample(SequentialRule(radii=(0.0,), alpha=0.05, max_draws=200), two, generator, images=runs)
    assert np.mean(outcomes.predictions != ABSTAIN) <= at_most(0.05, runs)


def test_bounding_the_runner_up_certifies_what_the_lower_bound_alone_cannot():
    outcomes, draws = sample(SequentialRule(radii=(0.7 * TRUE_RADIUS,)), FIVE, np.random.default_rng(0))
    assert outcomes.predictions == 0
    assert outcomes.p_lower < 0.5 < 1 - outcomes.p_upper
    assert outcomes.radii >= 0.7 * TRUE_RADIUS
    assert draws < 4_000
    outcomes, _ = sample(SequentialRule(tolerance=0.2, max_draws=50_000), FIVE, np.random.default_rng(1))
    assert 0.7 * TRUE_RADIUS < outcomes.radii < TRUE_RADIUS


@pytest.mark.parametrize(("radius", "p", "most"), [(0.5, 0.9, 1.3), (1.0, 0.95, 1.3), (2.0, 0.999, 1.3)])
def test_deciding_takes_little_more_than_walds_bound(radius, p, most):
    p0 = NOISE.probability_needed(radius)
    divergence = p * np.log(p / p0) + (1 - p) * np.log((1 - p) / (1 - p0))
    generator = np.random.default_rng(0)
    rule = SequentialRule(radii=(radius,), max_draws=100_000)
    probabilities = np.array([p, *[(1 - p) / 9] * 9])
    outcomes, draws = sample(rule, probabilities, generator, images=2000)
    assert np.mean(outcomes.radii >= radius) > 0.97
    assert draws.mean() <= most * np.log(1000) / divergence


def test_a_hopeless_radius_is_given_up_early_and_the_best_so_far_is_kept():
    generator = np.random.default_rng(0)
    rule = SequentialRule(radii=(0.5, 2.0), max_draws=100_000)
    outcomes, draws = sample(rule, np.array([0.8, 0.2]), generator)
    assert outcomes.predictions == 0
    assert NOISE.probability_needed(0.5) <= outcomes.p_lower < 0.8
    assert draws < 1000


def test_a_claim_stands_when_later_draws_speak_less_clearly():
    runs, row = SequentialRule(radii=(0.5, 1.0)).start(NOISE, 1, 2), np.array([0])
    draws = runs.start(row, CleanPass(np.zeros((1, 2))))[0]
    while runs.outcomes(row).predictions != 0:
        draws = runs.update(row, np.array([[draws, 0]]))[0]
    claimed = runs.outcomes(row)
    assert NOISE.radius(claimed.p_lower) >= 0.5
    while draws:
        draws = runs.update(row, np.array([[draws // 2, draws - draws // 2]]))[0]
    assert runs.outcomes(row) == claimed


def test_two_equal_classes_end_in_abstention():
    outcomes, draws = sample(SequentialRule(max_draws=1000), np.array([0.35, 0.35, 0.3]), np.random.default_rng(0))
    assert (outcomes.predictions, outcomes.radii, outcomes.p_lower, outcomes.p_upper) == (ABSTAIN, 0, 0, 1)
    assert draws < 1000  # the remaining draws cannot change it


@pytest.mark.parametrize(("classes", "top"), [(10, 0.5), (1000, 0.3)])
def test_a_top_class_far_below_the_threshold_of_the_lower_bound(classes, top):
    """There the evidence underflows; the bound of the runner-up may still show the radius."""
    probabilities = np.full(classes, (1 - top) / (classes - 1))
    probabilities[0] = top
    outcomes, _ = sample(
        SequentialRule(radii=(1.1,), max_draws=5000), probabilities, np.random.default_rng(0), images=5
    )
    assert set(outcomes.predictions.tolist()) <= {0, ABSTAIN}


def test_the_radius_is_found_to_the_tolerance():
    generator = np.random.default_rng(0)
    for tolerance in (0.05, 0.2):
        outcomes, draws = sample(
            SequentialRule(tolerance=tolerance, max_draws=100_000), np.array([0.95, 0.05]), generator
        )
        assert (1 - tolerance) * NOISE.radius(0.95) * 0.95 < NOISE.radius(outcomes.p_lower) < NOISE.radius(0.95)
        assert draws < 100_000


def test_fixed_takes_its_draws_and_does_not_count_the_selection():
    runs, row = FixedRule(n0=10, n=50).start(NOISE, 1, 2), np.array([0])
    assert runs.start(row, None) == 10
    assert runs.update(row, np.array([[0, 10]])) == 50
    assert runs.update(row, np.array([[40, 10]])) == 0
    assert runs.counts.tolist() == [[40, 10]]
    assert runs.outcomes(row).predictions == ABSTAIN  # class 1 was chosen, and is not the majority


def test_class_weights():
    (weights,) = class_weights(np.array([[0.0, 5.0, 1.0, -1.0]]), 0.05)
    assert weights.sum() == pytest.approx(1)
    assert weights.argsort().tolist() == [3, 0, 2, 1]
    assert weights.min() >= 0.05 / 4
    np.testing.assert_array_equal(*class_weights(np.zeros((2, 3)), 0.05))


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
    outcomes, _ = sample(make_rule(method, radius=radius, max_draws=needed + 5), [1.0], np.random.default_rng(0))
    assert outcomes.radii >= radius


def test_too_few_draws_to_predict():
    with pytest.raises(ValueError, match="n=5 draws always abstain"):
        PredictRule(n=5).check(NOISE)
    PredictRule(n=11).check(NOISE)
