"""Rules on draws with known class probabilities: sampled, and all outcomes with their exact probabilities."""

from copy import copy

import numpy as np
import pytest
from scipy import stats

from hf_smoothing import GaussianNoise
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.diagnostics.simulation import simulate

NOISE = GaussianNoise(1.0)


def sample(rule, probabilities, generator, scores=None, noise=NOISE, images=1):
    """Run a rule on images whose draws have known class probabilities; the outcomes and the draws they took."""
    scores = np.log(probabilities) if scores is None else scores
    rows = np.tile(np.asarray(probabilities, np.float64), (images, 1))
    return simulate(rule, noise, rows, CleanPass(np.tile(scores, (images, 1))), generator)


SHARED = ("radii",)
"""Arrays of runs that all rows share."""


def get_state(runs, rows):
    """Copies of the arrays of runs that have one element per row."""
    arrays = {
        name: value for name, value in vars(runs).items() if isinstance(value, np.ndarray) and name not in SHARED
    }
    return {name: value[rows] for name, value in arrays.items()}


def with_state(runs, state):
    runs = copy(runs)
    vars(runs).update(state)
    if hasattr(runs, "log_weights"):  # the same for all rows
        runs.log_weights = [np.repeat(weights[:1], len(state["counts"]), axis=0) for weights in runs.log_weights]
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


def wrong_share(rule, p, is_wrong=None, noise=NOISE, scores=(0.0, 0.0)):
    """The probability that the rule certifies class 0 beyond the radius that its true probability p gives."""
    is_wrong = is_wrong or (lambda outcomes: (outcomes.predictions == 0) & (outcomes.radii > noise.radius(p)))
    return sum(shares[is_wrong(outcomes)].sum() for outcomes, shares in exact_outcomes(rule, p, noise, scores))
