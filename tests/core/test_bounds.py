import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_smoothing.core.bounds import (
    JEFFREYS,
    OddsPrior,
    clopper_pearson_lower,
    confidence_sequence_lower,
    draws_to_reject,
    log_e_value,
)

counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
probabilities = st.floats(0.001, 0.999)
beta_priors = st.tuples(st.floats(0.1, 50), st.floats(0.1, 50))
odds_priors = st.lists(st.floats(0.01, 10), min_size=1, max_size=12).map(lambda steps: OddsPrior(tuple(steps)))
headed_priors = st.builds(
    lambda prior, distances, spread, floor: prior.reweight(distances, spread, floor),
    odds_priors,
    st.lists(st.floats(-60, 60), min_size=1, max_size=3),
    st.floats(0.05, 3),
    st.floats(0.01, 0.5),
)
priors = beta_priors | odds_priors | headed_priors
ODDS = OddsPrior.for_budget(1000, 0.05)


@given(counts, st.floats(1e-6, 0.5))
@settings(max_examples=50, deadline=None)
def test_clopper_pearson_is_scipys_exact_interval(count, alpha):
    hits, draws = count
    expected = stats.binomtest(hits, draws, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert clopper_pearson_lower(hits, draws, alpha) == pytest.approx(expected, abs=1e-12)


def test_clopper_pearson_at_the_edges():
    bounds = clopper_pearson_lower([0, 0, 10, 10**7, 10**7 - 1], [0, 10, 10, 10**7, 10**7], 0.001)
    assert bounds.dtype == np.float64
    expected = [0, 0, 0.001 ** (1 / 10), 0.001**1e-7, stats.beta.ppf(0.001, 10**7 - 1, 2)]
    np.testing.assert_allclose(bounds, expected, rtol=1e-14)


@given(counts, probabilities, beta_priors)
@settings(max_examples=40, deadline=None)
def test_e_value_is_the_integral_it_claims_to_be(count, null, prior):
    hits, draws = min(count[0], 40), min(count[1], 60)
    hits = min(hits, draws)
    grid = np.linspace(null, 1, 4001)
    middle = (grid[1:] + grid[:-1]) / 2
    mass = np.diff(stats.beta.cdf(grid, *prior))
    if mass.sum() < 1e-12:
        return
    ratio = stats.binom.pmf(hits, draws, middle) / stats.binom.pmf(hits, draws, null)
    expected = (mass * ratio).sum() / mass.sum()
    assert float(log_e_value(hits, draws, null, prior)) == pytest.approx(np.log(expected), abs=0.05)


@given(counts, probabilities, odds_priors)
@settings(max_examples=40, deadline=None)
def test_e_value_of_an_odds_prior_is_the_mean_likelihood_ratio_of_its_alternatives(count, null, prior):
    hits, draws = count
    odds = null / (1 - null) * np.exp(prior.steps)
    ratios = stats.binom.logpmf(hits, draws, odds / (1 + odds)) - stats.binom.logpmf(hits, draws, null)
    expected = np.logaddexp.reduce(ratios) - np.log(len(prior.steps))
    assert float(log_e_value(hits, draws, null, prior)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_odds_prior_of_a_budget_reaches_down_to_what_the_budget_can_tell():
    for budget in (100, 10_000, 1_000_000):
        steps = OddsPrior.for_budget(budget, 0.001).steps
        nearest = 1 / (1 + np.exp(-steps[-1]))
        walds = np.log(1000) / (np.log(2) + nearest * np.log(nearest) + (1 - nearest) * np.log(1 - nearest))
        assert budget / 4 / 1.6**2 < walds < budget / 4 * 1.2
    assert len(OddsPrior.for_budget(1, 0.001).steps) == 1


def test_e_value_at_the_edges():
    assert float(log_e_value(0, 0, 0.7)) == 0
    assert float(log_e_value(0, 50, 0.7)) < 0
    assert np.isfinite(log_e_value([10**7, 10**7 - 3], 10**7, [0.9999, 0.999999])).all()
    # a prior without mass above the null is no evidence, not NaN
    assert float(log_e_value(50, 50, 0.999999, (1, 10_000))) == -np.inf
    for prior in (JEFFREYS, ODDS):
        assert log_e_value([[1], [2]], [3, 4, 5], 0.5, prior).shape == (2, 3)
        assert log_e_value(1, 5, [[0.5], [0.6]], prior).shape == (2, 1)
    assert float(log_e_value(0, 0, 0.7, ODDS)) == 0


@given(st.integers(1, 300), probabilities, priors)
@settings(max_examples=50, deadline=None)
def test_e_value_is_fair_at_the_null(draws, null, prior):
    """At p = null its mean is 1 after any number of draws: neither wasteful nor too good."""
    hits = np.arange(draws + 1)
    log_e = log_e_value(hits, draws, null, prior)
    if not np.isfinite(log_e).all():
        return
    assert np.exp(log_e + stats.binom.logpmf(hits, draws, null)).sum() == pytest.approx(1, abs=1e-6)


def _paths(p: float, runs: int, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).binomial(1, p, (runs, draws)).cumsum(1)


def _evaluate(function, hits, looks):
    """A function of hits and draws at every look of every path, computed once for each number of hits."""
    tables = [function(np.arange(look + 1), look) for look in looks]
    return np.stack([table[column] for table, column in zip(tables, hits.T)], 1)


@pytest.mark.parametrize(
    ("null", "prior"), [(0.5, (0.5, 0.5)), (0.841, (0.5, 0.5)), (0.977, (19.0, 1.0)), (0.5, ODDS), (0.841, ODDS)]
)
@pytest.mark.parametrize("below", [0.0, 0.005])
def test_e_process_holds_at_the_luckiest_moment(null, prior, below):
    runs, draws, alpha = 20_000, 200, 0.05
    looks = np.unique(np.geomspace(1, draws, 40).astype(int))
    hits = _paths(null - below, runs, draws, seed=1)[:, looks - 1]
    log_e = _evaluate(lambda hits, look: log_e_value(hits, look, null, prior), hits, looks)
    wrong = (log_e.max(1) >= -np.log(alpha)).mean()
    assert wrong <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)


@pytest.mark.parametrize("prior", [JEFFREYS, ODDS])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_confidence_sequence_holds_at_all_times_at_once(p, prior):
    runs, draws, alpha = 2_000, 300, 0.05
    looks = np.unique(np.geomspace(1, draws, 20).astype(int))
    hits = _paths(p, runs, draws, seed=2)[:, looks - 1]
    lower = _evaluate(lambda hits, look: confidence_sequence_lower(hits, look, alpha, prior), hits, looks)
    wrong = (lower.max(1) > p).mean()
    assert wrong <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)


@given(counts, st.floats(1e-5, 0.2), priors)
@settings(max_examples=80, deadline=None)
def test_confidence_sequence_rejects_everything_below_its_bound(count, alpha, prior):
    """The bound inverts the e-process: evidence descends in the null, so that no gap below the bound is left."""
    hits, draws = count
    lower = float(confidence_sequence_lower(hits, draws, alpha, prior))
    assert 0 <= lower <= hits / draws
    null = np.linspace(1e-6, hits / draws, 200)[:-1] if hits > 1 else np.array([])
    null = null[(null > 0) & (null < 1)]
    log_e = log_e_value(hits, draws, null, prior)
    assert (np.diff(log_e[np.isfinite(log_e)]) <= 1e-6).all()
    assert (log_e[null < lower * (1 - 1e-9)] >= -np.log(alpha) - 1e-6).all()
    assert (log_e[null > lower + 1e-6] < -np.log(alpha)).all()


def test_confidence_sequence_at_the_edges():
    bounds = confidence_sequence_lower([0, 0, 10, 10**7, 10**7 - 10], [0, 10, 10, 10**7, 10**7], 0.001)
    assert (bounds[:2] == 0).all()
    # at any time costs more than at one time, but little
    fixed = clopper_pearson_lower([10, 10**7, 10**7 - 10], [10, 10**7, 10**7], 0.001)
    assert (bounds[2:] < fixed).all()
    np.testing.assert_allclose(1 - bounds[3:], 1 - fixed[1:], rtol=0.25)


@pytest.mark.parametrize("null", [0.5, 0.9, 0.9999])
def test_draws_to_reject_is_the_least(null):
    draws = draws_to_reject(null, 0.001)
    log_e = log_e_value([draws, draws - 1], [draws, draws - 1], null)
    assert log_e[0] >= np.log(1000) > log_e[1]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: clopper_pearson_lower(5, 4, 0.1), "successes=5"),
        (lambda: clopper_pearson_lower([1, -1], 4, 0.1), "successes=-1"),
        (lambda: clopper_pearson_lower(1, 4, 1.0), "alpha=1.0"),
        (lambda: clopper_pearson_lower(np.nan, 4, 0.1), "successes=nan"),
        (lambda: log_e_value(1, 4, 0.0), "null_probability=0.0"),
        (lambda: log_e_value(1, 4, 0.5, (0, 1)), "prior=(0, 1)"),
        (lambda: OddsPrior((1.0, -1.0)), "steps=(1.0, -1.0)"),
        (lambda: confidence_sequence_lower(1, 4, float("nan")), "alpha=nan"),
        (lambda: draws_to_reject(1.0, 0.1), "null_probability=1.0"),
    ],
)
def test_errors_name_the_value(call, named):
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert named in str(caught.value)


def test_a_bound_does_not_depend_on_the_others_that_are_computed_with_it():
    generator = np.random.default_rng(0)
    trials = generator.integers(1, 5000, 300)
    successes = generator.binomial(trials, generator.random(300))
    prior = OddsPrior.for_budget(5000, 0.001)
    together = confidence_sequence_lower(successes, trials, 0.001, prior)
    alone = [float(confidence_sequence_lower(*pair, 0.001, prior)) for pair in zip(successes, trials)]
    assert together.tolist() == alone
