import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_smoothing.core.bounds import clopper_pearson_lower

counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((5, 3, 0.01), "successes=5 must lie between 0 and trials=3"),
        ((-1, 3, 0.01), "successes=-1"),
        (([1, 2], [1, 1], 0.01), "successes=2 must lie between 0 and trials=1"),
        ((1, 3, 0.0), "alpha=0.0"),
        ((1, 3, float("nan")), "alpha=nan"),
    ],
)
def test_errors_name_the_value(arguments, named):
    with pytest.raises(ValueError, match=r".") as caught:
        clopper_pearson_lower(*arguments)
    assert named in str(caught.value)
