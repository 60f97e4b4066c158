"""Which settings rules accept, what all of them claim, and how often the rules with a fixed number of draws are wrong."""

import numpy as np
import pytest
from helpers.exact_outcomes import NOISE, sample, wrong_share

from hf_smoothing import ABSTAIN, FixedRule, GaussianNoise, LaplaceNoise, SequentialRule, TwoStageRule, UniformNoise
from hf_smoothing.core.lattice import SampledNoise
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.core.rules import make_rule


@pytest.mark.parametrize("p", [0.55, 0.841])
def test_fixed_is_wrong_at_most_alpha(p):
    # more than 0.01: the test has something to see
    assert 0.01 < wrong_share(FixedRule(n0=10, n=100, alpha=0.05), p) <= 0.05


@pytest.mark.parametrize("noise", [UniformNoise(1.0), LaplaceNoise(1.0)], ids=lambda noise: noise.name)
@pytest.mark.parametrize(
    "rule",
    [
        FixedRule(n0=10, n=100, alpha=0.05),
        SequentialRule(radii=(0.5,), alpha=0.05, max_draws=60),
        SequentialRule(radii=(0.2, 0.5, 0.8), alpha=0.05, max_draws=60),
        TwoStageRule(draws=40, alpha=0.05, max_draws=100),
    ],
    ids=["fixed", "one radius", "radii", "find"],
)
def test_every_rule_is_wrong_at_most_alpha_with_other_noise_too(noise, rule):
    """p just under what radius 0.5 takes."""
    p = noise.probability_needed(0.5) - 1e-9

    def is_wrong(outcomes):
        return (outcomes.predictions == 0) & (outcomes.radii >= 0.5)

    assert 0 < wrong_share(rule, p, is_wrong, noise) <= 0.05


def test_fixed_takes_its_draws_and_does_not_count_the_selection():
    runs, row = FixedRule(n0=10, n=50).start(NOISE, 1, 2), np.array([0])
    assert runs.start(row, None) == 10
    assert runs.update(row, np.array([[0, 10]])) == 50
    assert runs.update(row, np.array([[40, 10]])) == 0
    assert runs.counts.tolist() == [[40, 10]]
    assert runs.outcomes(row).predictions == ABSTAIN  # class 1 was chosen, and is not the majority


@pytest.mark.parametrize("method", ["two-stage", "sequential", "fixed"])
def test_rows_do_not_depend_on_each_other(method):
    """A row gives the same alone, beside others, and in a row that another image had before."""
    settings = {"sequential": {"radius": 0.5}, "two-stage": {"draws": 100}}.get(method, {})
    rule = make_rule(method, max_draws=400, **settings)
    probabilities = np.random.default_rng(0).dirichlet(np.full(5, 0.5), 30)

    def run(runs, rows, images):
        generators = [np.random.default_rng([1, image]) for image in images]
        wanted, draws = runs.start(rows, CleanPass(probabilities[images])), np.zeros(len(rows), np.int64)
        while wanted.any():
            active = np.flatnonzero(wanted)
            counts = [generators[place].multinomial(wanted[place], probabilities[images[place]]) for place in active]
            draws[active] += wanted[active]
            wanted[active] = runs.update(rows[active], np.array(counts))
        outcomes = runs.outcomes(rows)
        return list(zip(outcomes.predictions.tolist(), outcomes.radii.tolist(), draws.tolist()))

    together = run(rule.start(NOISE, 30, 5), np.arange(30), np.arange(30))
    shared = rule.start(NOISE, 2, 5)
    alone = [run(shared, np.array([image % 2]), np.array([image]))[0] for image in range(30)]
    assert alone == together
    assert len({draws for _, _, draws in together}) > 2 or method == "fixed"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method='magic'"),
        ({"method": "fixed", "alpha": 0.0}, "alpha=0.0"),
        ({"radius": 0.5, "alpha": 1.5}, "alpha=1.5"),
        ({"method": "fixed", "n": 0}, "n=0"),
        ({"method": "fixed", "n": 1e2}, "n=100.0 must be a whole number"),
        ({"radius": 0.5, "max_draws": float("nan")}, "max_draws=nan"),
        ({"radius": 0.5, "alpha": "0.1"}, "alpha='0.1'"),
        ({"method": "sequential", "radius": "0.5"}, "radius='0.5'"),
        ({"method": "sequential", "radii": 0.5}, "radii=0.5 must be a list"),
        ({"method": "fixed", "radii": (-1, 0.2)}, "radius=-1"),
        ({"radius": 0.5, "max_draws": 0}, "max_draws=0"),
        ({"method": "sequential", "radius": -1.0}, "radius=-1.0"),
        ({"method": "sequential", "radius": float("nan")}, "radius=nan"),
        ({"method": "sequential", "radii": ()}, "radii=()"),
        ({"method": "sequential", "radius": 1.0, "radii": (1.0,)}, "not both"),
        ({"method": "sequential", "n0": 5}, "n0=5"),
        ({"method": "sequential"}, "decides radii"),
        ({"radius": 1.0, "draws": 50}, "draws=50 has no meaning for method 'sequential'"),
        ({"draws": 5}, "draws=5 must be above 8"),
        ({"method": "two-stage", "radius": 1.0}, "radius=1.0"),
        ({"method": "fixed", "n": 7, "max_draws": 6}, "max_draws=6 must be above n0=100"),
        ({"method": "fixed", "n0": 2, "n": 7, "max_draws": 8}, "n0 + n = 9 exceeds max_draws=8"),
        ({"radius": 1.0, "n0": 50}, "n0=50 has no meaning for method 'sequential', the default with radii"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=r".") as caught:
        make_rule(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["fixed", "sequential"])
@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_too_few_draws_for_the_radius_are_refused_with_the_number_it_takes(method, radius):
    name = "n" if method == "fixed" else "max_draws"
    with pytest.raises(ValueError, match="can never certify radius") as caught:
        make_rule(method, radius=radius, **{name: 10}).check(NOISE)
    needed = int(str(caught.value).split("at least ")[1].split(" draws")[0].replace(",", ""))
    make_rule(method, radius=radius, **{name: needed}).check(NOISE)
    with pytest.raises(ValueError, match="can never certify"):
        make_rule(method, radius=radius, **{name: needed - 1}).check(NOISE)
    outcomes, _ = sample(make_rule(method, radius=radius, **{name: needed + 5}), [1.0], np.random.default_rng(0))
    assert outcomes.radii >= radius


def test_fixed_makes_as_many_draws_as_allowed():
    assert make_rule("fixed", max_draws=300).budget == 300
    assert make_rule("fixed", n0=10, max_draws=300).n == 290


@pytest.mark.parametrize("method", ["fixed", "sequential", "two-stage"])
def test_noise_below_the_error_of_the_sampler_is_refused(method):
    settings = {"radius": 0.0} if method == "sequential" else {}
    for noise in (GaussianNoise(1e-7), UniformNoise(1e-4)):
        with pytest.raises(ValueError, match="can never"):
            make_rule(method, **settings).check(SampledNoise(noise, 3 * 224 * 224))


def test_the_question_chooses_the_method():
    assert make_rule().method == "two-stage"
    assert make_rule(radius=0.5).method == make_rule(radii=(0.0, 0.5)).method == "sequential"
