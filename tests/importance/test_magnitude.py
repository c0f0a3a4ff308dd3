"""Magnitude by hand."""

from __future__ import annotations

import torch
from torch import nn

from ovsprune.core.protocols import GroupContext
from ovsprune.core.records import Group, Slice
from ovsprune.importance import CRITERIA


def test_magnitude_sums_every_slice_of_a_unit() -> None:
    first, second = nn.Linear(3, 4, bias=True), nn.Linear(4, 2)
    rows = torch.tensor([[0, 2], [1, 3]])
    group = Group("g", "heads", 2, (Slice("a", "out", rows), Slice("b", "in", rows)), "b", "block")
    item = GroupContext(group, {"a": first, "b": second}, None, 1e-2, torch.Generator())
    ranking = CRITERIA.get("magnitude").score(item)
    for unit, places in enumerate(rows.tolist()):
        squares = first.weight[places].square().sum() + second.weight[:, places].square().sum()
        torch.testing.assert_close(ranking.costs[unit], squares.sqrt().double(), check_dtype=True)
    assert ranking.order.tolist() == ranking.costs.argsort().tolist()
