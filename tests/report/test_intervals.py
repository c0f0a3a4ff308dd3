from __future__ import annotations

import pytest
from scipy import stats

from ovsprune.report.intervals import pooled_difference, spread


def test_spread_computed_by_hand():
    found = spread([0.90, 0.92, 0.94, 0.96, 0.98])
    assert found.mean == pytest.approx(0.94)
    assert found.sd == pytest.approx(0.0316228, abs=1e-6)
    assert found.half == pytest.approx(2.776445 * 0.0316228 / 5**0.5, abs=1e-6)
    assert (spread([0.5]).sd, spread([0.5]).half) == (None, None)


@pytest.mark.parametrize(
    ("a", "b"),
    [([3.0, 4.0, 5.5], [1.0, 1.5, 2.5, 2.0]), ([1.0, 2.0], [1.5]), ([1.0, 1.0], [0.0, 0.0])],
)
def test_pooled_difference_equals_scipys_t_test(a, b):
    found = pooled_difference(a, b)
    assert found.mean == pytest.approx(sum(a) / len(a) - sum(b) / len(b))
    if min(len(a), len(b)) > 1 and len(set(a)) > 1:
        interval = stats.ttest_ind(a, b, equal_var=True).confidence_interval(0.95)
        assert found.mean - found.half == pytest.approx(interval.low)
        assert found.mean + found.half == pytest.approx(interval.high)


def test_clear_difference_excludes_zero():
    assert pooled_difference([1.0, 1.1, 0.9], [0.1, 0.0, 0.2]).clear
    assert not pooled_difference([1.0, 0.0, 0.5], [0.4, 0.6, 0.1]).clear
    single = pooled_difference([1.0], [0.0])
    assert (single.mean, single.half, single.clear) == (1.0, None, False)


def test_empty_sample_is_refused():
    with pytest.raises(ValueError, match="values is empty"):
        spread([])


def test_interval_has_its_nominal_coverage():
    """95% of the intervals contain the true difference, which is zero."""
    import numpy as np

    draws = np.random.default_rng(0).normal(size=(400, 2, 5))
    misses = sum(pooled_difference(list(a), list(b)).clear for a, b in draws)
    assert 0.02 < misses / len(draws) < 0.08
