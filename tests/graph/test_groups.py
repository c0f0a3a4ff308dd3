"""Groups: slices found by the dependency graph, costs, and refused layers."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.protocols import PrunableLayer
from ovsprune.core.records import Plan
from ovsprune.graph.cut import cut, mask, removed_units
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


def test_a_norm_between_is_cut_with_the_units() -> None:
    tower = Convolutions(forked=False).eval()
    with torch.no_grad():
        for value in (tower.norm.running_mean, tower.norm.weight, tower.norm.bias):
            value.uniform_(0.5, 1)
    (group,) = find_groups(tower, [PrunableLayer("g", "channels", "first", 1, "", None)], (16, 16))
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
    assert removed_units(group, plan).tolist() == [1, 2, 4, 6, 7]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        masked = nn.functional.relu(tower.norm(tower.first(x)))
        masked[:, removed_units(group, plan)] = 0
        expected = tower.second(masked)
        cut(tower, [group], plan)
        torch.testing.assert_close(tower(x), expected, atol=1e-5, rtol=1e-5)
    assert (tower.first.out_channels, tower.norm.num_features, tower.second.in_channels) == (3,) * 3


def test_units_with_two_readers_are_refused() -> None:
    layer = PrunableLayer("g", "channels", "first", 1, "", None)
    with pytest.raises(ValueError, match="expected exactly one layer"):
        find_groups(Convolutions(forked=True).eval(), [layer], (16, 16))


def test_the_consumer_of_units_with_two_readers_is_named() -> None:
    tower = Convolutions(forked=True).eval().requires_grad_(False)
    layer = PrunableLayer("g", "channels", "first", 1, "", None, consumer="second")
    (group,) = find_groups(tower, [layer], (16, 16))
    assert group.consumer == "second" and group.gating_layers == ()
    assert {s.module for s in group.readers} == {"second", "fork"}
    plan, x = Plan({"g": torch.tensor([0, 3, 5])}), torch.randn(2, 3, 16, 16)
    masked = deepcopy(tower)
    mask(masked, [group], plan)
    cut(tower, [group], plan)
    torch.testing.assert_close(tower(x), masked(x), atol=1e-6, rtol=1e-5)
    assert tower.fork is not None and tower.fork.in_channels == 3


def test_a_named_consumer_must_read_the_units() -> None:
    layer = PrunableLayer("g", "channels", "first", 1, "", None, consumer="norm")
    with pytest.raises(ValueError, match=r"read by \['second'\], expected norm"):
        find_groups(Convolutions(forked=False).eval(), [layer], (16, 16))


def test_a_unit_width_that_does_not_divide_the_channels_is_refused() -> None:
    layer = PrunableLayer("g", "channels", "first", 3, "", None)
    with pytest.raises(ValueError, match="has 8 channels, expected a multiple of unit_width = 3"):
        find_groups(Convolutions(forked=False).eval(), [layer], (16, 16))


def test_no_prunable_layers_give_no_groups() -> None:
    assert find_groups(Convolutions(forked=False), [], (16, 16)) == []


class Separable(nn.Module):
    """Tower of a 1x1 layer, a convolution of ``groups`` groups between norms, and a 1x1 reader."""

    def __init__(self, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1, stride=stride, groups=groups)
        self.after, self.reduce = nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.reduce(self.after(self.middle(self.norm(self.expand(x)).relu())).relu())
        return out


def test_a_depthwise_convolution_is_cut_with_the_units() -> None:
    tower = Separable(groups=8).eval().requires_grad_(False)
    for norm in (tower.norm, tower.after):
        norm.running_mean.uniform_(0.5, 1)
    (group,) = find_groups(tower, [PrunableLayer("g", "channels", "expand", 1, "", None)], (16, 16))
    assert not any(p.requires_grad for p in tower.parameters())
    assert group.norms == ("norm", "after")
    assert {(s.module, s.axis) for s in group.slices} == {
        ("expand", "out"),
        ("norm", "out"),
        ("middle", "out"),
        ("after", "out"),
        ("reduce", "in"),
    }
    assert group.macs == 256 * (3 + 9 + 3)
    assert group.params == 3 + 2 + 10 + 2 + 3
    plan = Plan({"g": torch.tensor([0, 3, 5])})
    x = torch.randn(2, 3, 16, 16)
    masked = deepcopy(tower)
    mask(masked, [group], plan)
    cut(tower, [group], plan)
    torch.testing.assert_close(tower(x), masked(x), atol=1e-6, rtol=1e-5)
    assert (tower.middle.in_channels, tower.middle.out_channels, tower.middle.groups) == (3,) * 3


def test_requires_grad_flags_are_restored() -> None:
    tower = Separable(groups=8).eval()
    tower.expand.requires_grad_(False)
    find_groups(tower, [PrunableLayer("g", "channels", "expand", 1, "", None)], (16, 16))
    assert [n for n, p in tower.named_parameters() if not p.requires_grad] == ["expand.weight"]


def test_groups_of_several_channels_are_refused() -> None:
    layer = PrunableLayer("g", "channels", "expand", 1, "", None)
    with pytest.raises(
        ValueError, match="units of expand pass through middle, a convolution whose groups"
    ):
        find_groups(Separable(groups=2).eval(), [layer], (16, 16))


def test_equal_layers_at_different_resolutions_have_different_costs() -> None:
    tower = nn.Sequential(Separable(8), Separable(8, stride=2), Separable(8)).eval()
    layers = [PrunableLayer(f"{i}", "channels", f"{i}.expand", 1, "", None) for i in range(3)]
    costs = [group.macs for group in find_groups(tower, layers, (16, 16))]
    assert costs == [256 * 15, 256 * 3 + 64 * 12, 64 * 15]
