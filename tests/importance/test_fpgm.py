"""FPGM costs computed by hand."""

from __future__ import annotations

import pytest
import torch

from ovsprune.importance import CRITERIA
from tests.importance.by_hand import context, normal


def test_units_near_the_median_have_the_lowest_cost() -> None:
    make = torch.tensor([[5.0], [0.0], [5.5], [9.0]])
    ranking = CRITERIA.get("fpgm").score(context(make, torch.ones(2, 4)))
    assert ranking.costs.tolist() == pytest.approx([9.5, 19.5, 9.5, 16.5])
    assert ranking.order[0] in (0, 2) and ranking.order[-1] == 1


def test_duplicates_cost_less_than_distinct_units() -> None:
    make = torch.eye(4)[[0, 1, 0, 2, 3]]
    costs = CRITERIA.get("fpgm").score(context(make, torch.ones(2, 5))).costs
    torch.testing.assert_close(costs[0], costs[2])
    assert costs[[0, 2]].max() < costs[[1, 3, 4]].min() - 1


def test_consumer_weights_do_not_count() -> None:
    make = normal(6, 5)
    one = CRITERIA.get("fpgm").score(context(make, normal(3, 6, seed=1), width=2)).costs
    two = CRITERIA.get("fpgm").score(context(make, normal(3, 6, seed=2), width=2)).costs
    assert torch.equal(one, two)
    rows = make.double().view(3, -1)
    expected = (rows[:, None] - rows).norm(dim=2).sum(1)
    torch.testing.assert_close(one, expected)
