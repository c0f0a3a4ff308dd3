"""FLAP scores computed by hand."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import Ranking
from ovsprune.importance import CRITERIA
from tests.importance.by_hand import context, normal

VARIANCE = torch.tensor([1.0, 4.0, 0.0, 2.0])
READ = torch.tensor([[1.0, 0.0, 9.0, 1.0], [1.0, 1.0, 9.0, -2.0]])


def score(variance: torch.Tensor, read: torch.Tensor, width: int = 1, mean: float = 0) -> Ranking:
    n = len(variance)
    ctx = context(
        normal(n, 3), read, width=width, covariance=variance.diag(), mean=torch.full((n,), mean)
    )
    return CRITERIA.get("activation").score(ctx)


def test_costs_are_standardised_fluctuation_times_weight() -> None:
    fluctuation = torch.tensor([2.0, 4.0, 0.0, 10.0], dtype=torch.float64)
    z = (fluctuation - 4) / fluctuation.std(correction=0)
    torch.testing.assert_close(score(VARIANCE, READ).costs, z.exp())


def test_constant_unit_has_the_lowest_cost() -> None:
    ranking = score(VARIANCE, READ, mean=100.0)
    assert ranking.order.tolist() == [2, 0, 1, 3]
    assert torch.equal(ranking.costs, score(VARIANCE, READ).costs)


def test_costs_do_not_depend_on_the_scale_of_a_layer() -> None:
    large = score(1e4 * VARIANCE, 10 * READ).costs
    torch.testing.assert_close(large, score(VARIANCE, READ).costs)


def test_head_score_is_the_mean_over_its_columns() -> None:
    columns, heads = score(VARIANCE, READ).costs, score(VARIANCE, READ, width=2).costs
    torch.testing.assert_close(heads, columns.log().view(2, 2).mean(1).exp())


def test_equal_units_get_equal_costs() -> None:
    ranking = score(torch.ones(4), torch.ones(2, 4))
    assert ranking.costs.tolist() == [1.0] * 4
    assert ranking.order.tolist() == [0, 1, 2, 3]
