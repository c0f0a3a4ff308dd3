"""LAMP scores computed by hand."""

from __future__ import annotations

import pytest
import torch

from ovsprune.importance import CRITERIA
from tests.importance.by_hand import context, normal


def test_cost_is_relative_to_units_at_least_as_large() -> None:
    make = torch.tensor([3.0, 1.0, 2.0]).sqrt()[:, None]
    ranking = CRITERIA.get("lamp").score(context(make, torch.zeros(2, 3)))
    assert ranking.costs.tolist() == pytest.approx([1.0, 1 / 6, 2 / 5])
    assert ranking.order.tolist() == [1, 2, 0]


def test_order_equals_that_of_magnitude() -> None:
    ctx = context(normal(12, 5), normal(3, 12, seed=1), width=2)
    expected = CRITERIA.get("magnitude").score(ctx).order
    ranking = CRITERIA.get("lamp").score(ctx)
    assert torch.equal(ranking.order, expected)
    assert bool((ranking.costs[ranking.order].diff() > 0).all())


def test_costs_do_not_depend_on_the_scale_of_a_layer() -> None:
    make, read = normal(6, 5), normal(3, 6, seed=1)
    small = CRITERIA.get("lamp").score(context(make, read)).costs
    large = CRITERIA.get("lamp").score(context(100 * make, 100 * read)).costs
    torch.testing.assert_close(large, small)


def test_zero_units_cost_nothing() -> None:
    make, read = normal(4, 5), normal(3, 4, seed=1)
    make[2], read[:, 2] = 0, 0
    ranking = CRITERIA.get("lamp").score(context(make, read))
    assert ranking.costs[2] == 0 and ranking.order[0] == 2
    assert CRITERIA.get("lamp").score(context(0 * make, 0 * read)).costs.tolist() == [0.0] * 4
