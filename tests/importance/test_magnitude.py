"""Magnitude by hand, in both norms."""

from __future__ import annotations

import torch
from torch import nn

from ovsprune.core.protocols import GroupContext
from ovsprune.core.records import Group, Slice
from ovsprune.importance import CRITERIA
from tests.importance.by_hand import context, normal


def pair() -> GroupContext:
    """Two heads of two scattered channels each."""
    first, second = nn.Linear(3, 4, bias=True), nn.Linear(4, 2)
    rows = torch.tensor([[0, 2], [1, 3]])
    group = Group("g", "heads", 2, (Slice("a", "out", rows), Slice("b", "in", rows)), "b", "block")
    return GroupContext(group, {"a": first, "b": second}, None, 1e-2, torch.Generator())


def test_magnitude_sums_every_slice_of_a_unit() -> None:
    ctx = pair()
    ranking = CRITERIA.get("magnitude").score(ctx)
    a, b = (ctx.layers[name].weight for name in "ab")
    for unit, places in enumerate([[0, 2], [1, 3]]):
        squares = a[places].square().sum() + b[:, places].square().sum()
        torch.testing.assert_close(ranking.costs[unit], squares.sqrt().double(), check_dtype=True)
    assert ranking.order.tolist() == ranking.costs.argsort().tolist()


def test_l1_sums_absolute_values() -> None:
    ctx = pair()
    ranking = CRITERIA.get("magnitude-l1").score(ctx)
    a, b = (ctx.layers[name].weight for name in "ab")
    for unit, places in enumerate([[0, 2], [1, 3]]):
        total = a[places].abs().sum() + b[:, places].abs().sum()
        torch.testing.assert_close(ranking.costs[unit], total.double(), check_dtype=True)
    assert ranking.order.tolist() == ranking.costs.argsort().tolist()


def test_the_norms_differ_about_one_large_weight_and_many_small_ones() -> None:
    make = torch.tensor([[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    ctx = context(make, torch.zeros(2, 2))
    assert CRITERIA.get("magnitude").score(ctx).order.tolist() == [1, 0]
    assert CRITERIA.get("magnitude-l1").score(ctx).order.tolist() == [0, 1]


def test_scales_of_norms_do_not_count() -> None:
    make, read = normal(4, 3), normal(2, 4, seed=1)
    for name in ("magnitude", "magnitude-l1"):
        plain = CRITERIA.get(name).score(context(make, read))
        scaled = CRITERIA.get(name).score(context(make, read, scale=100 * torch.ones(4)))
        assert torch.equal(plain.costs, scaled.costs)


def test_kernels_count_whole() -> None:
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
    rows = torch.arange(4).view(4, 1)
    group = Group("g", "channels", 4, (Slice("a", "out", rows), Slice("b", "in", rows)), "b", "")
    ctx = GroupContext(group, {"a": first, "b": second}, None, 1e-2, torch.Generator())
    squares = first.weight.square().sum((1, 2, 3)) + second.weight.square().sum((0, 2, 3))
    costs = CRITERIA.get("magnitude").score(ctx).costs
    torch.testing.assert_close(costs, squares.sqrt().double())
