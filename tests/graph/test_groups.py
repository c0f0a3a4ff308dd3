"""Groups: what the graph finds, and what it must refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.protocols import Seed
from ovsprune.core.records import Plan
from ovsprune.graph.cut import cut, removed
from ovsprune.graph.groups import find_groups


class Convolutions(nn.Module):
    """Two branches that read one layer, a norm in between, and a residual."""

    def __init__(self, forked: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.fork = nn.Conv2d(8, 6, 1) if forked else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        out = self.second(x)
        return out if self.fork is None else out + self.fork(x)


def test_a_norm_between_goes_along() -> None:
    tower = Convolutions(forked=False).eval()
    with torch.no_grad():
        for value in (tower.norm.running_mean, tower.norm.weight, tower.norm.bias):
            value.uniform_(0.5, 1)
    (group,) = find_groups(tower, [Seed("g", "channels", "first", 1, "", None)], (16, 16))
    assert group.units == 8
    assert group.consumer == "second"
    assert group.norms == ("norm",)
    assert {(s.module, s.axis) for s in group.slices} == {
        ("first", "out"),
        ("norm", "out"),
        ("second", "in"),
    }
    assert group.macs == 256 * 9 * (3 + 6)
    assert group.params == 9 * 3 + 1 + 2 + 9 * 6
    plan = Plan({"g": torch.tensor([0, 3, 5])})
    assert removed(group, plan).tolist() == [1, 2, 4, 6, 7]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        masked = nn.functional.relu(tower.norm(tower.first(x)))
        masked[:, removed(group, plan)] = 0
        expected = tower.second(masked)
        cut(tower, [group], plan)
        torch.testing.assert_close(tower(x), expected, atol=1e-5, rtol=1e-5)
    assert (tower.first.out_channels, tower.norm.num_features, tower.second.in_channels) == (3,) * 3


def test_units_with_two_readers_are_refused() -> None:
    seed = Seed("g", "channels", "first", 1, "", None)
    with pytest.raises(ValueError, match="not by one layer"):
        find_groups(Convolutions(forked=True).eval(), [seed], (16, 16))


def test_units_of_a_width_that_does_not_divide_are_refused() -> None:
    seed = Seed("g", "channels", "first", 3, "", None)
    with pytest.raises(ValueError, match="8 channels are no multiple of 3"):
        find_groups(Convolutions(forked=False).eval(), [seed], (16, 16))


def test_nothing_offered_nothing_found() -> None:
    assert find_groups(Convolutions(forked=False), [], (16, 16)) == []
