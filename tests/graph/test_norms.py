"""Norms folded into the layer before them, and unfolded again."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from ovsprune.core.records import Group, Plan, Slice
from ovsprune.graph.cut import cut
from ovsprune.graph.norms import fold_norm, unfold_norm


def pair(bias: bool = False) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    generator = torch.Generator().manual_seed(0)
    layer, norm = nn.Conv2d(6, 5, 3, bias=bias), nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2, generator=generator)
        norm.bias.normal_(generator=generator)
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.1, 3, generator=generator)
    return layer.eval().requires_grad_(False), norm.eval().requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
def test_the_folded_layer_equals_layer_and_norm(bias: bool) -> None:
    layer, norm = (module.double() for module in pair(bias))
    images = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    folded, place = fold_norm(layer, norm)
    torch.testing.assert_close(place(folded(images)), norm(layer(images)), atol=1e-12, rtol=1e-12)
    assert folded.bias is not None and not folded.weight.requires_grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [None, torch.tensor([0, 2, 5])])
def test_unchanged_entries_are_restored_bit_for_bit(
    bias: bool, columns: torch.Tensor | None
) -> None:
    layer, norm = pair(bias)
    folded, place = fold_norm(layer, norm)
    if columns is not None:
        folded.weight = nn.Parameter(folded.weight[:, columns].clone(), requires_grad=False)
        folded.in_channels = len(columns)
    again, after = unfold_norm(folded, deepcopy(place), columns)
    wanted = layer.weight if columns is None else layer.weight[:, columns]
    assert torch.equal(again.weight, wanted)
    assert (again.bias is None) == (layer.bias is None)
    assert after is not norm and type(after) is nn.BatchNorm2d
    assert all(torch.equal(v, norm.state_dict()[k]) for k, v in after.state_dict().items())


def test_cut_rows_are_cut_in_the_norm_too() -> None:
    layer, norm = pair(bias=True)
    folded, place = fold_norm(layer, norm)
    tower = nn.ModuleDict({"layer": folded, "norm": place})
    columns, rows = torch.tensor([0, 2, 5]), torch.tensor([1, 2, 4])
    groups = [
        group("a", 6, (Slice("layer", "in", torch.arange(6)[:, None]),)),
        group("b", 5, tuple(Slice(n, "out", torch.arange(5)[:, None]) for n in tower)),
    ]
    cut(tower, groups, Plan({"a": columns, "b": rows}))
    images = torch.randn(2, 3, 7, 7)
    wanted = tower["norm"](tower["layer"](images))
    again, after = unfold_norm(tower["layer"], place, columns, rows)
    torch.testing.assert_close(after(again(images)), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.weight, layer.weight[rows][:, columns])
    assert torch.equal(again.bias, layer.bias[rows])
    assert after.num_features == again.out_channels == 3
    assert all(
        torch.equal(v, norm.state_dict()[k] if v.ndim == 0 else norm.state_dict()[k][rows])
        for k, v in after.state_dict().items()
    )


def group(name: str, units: int, slices: tuple[Slice, ...]) -> Group:
    return Group(name, "channels", units, slices, "layer", "block")


def test_folding_keeps_the_number_of_parameters() -> None:
    layer, norm = pair()
    before = [p.numel() for module in (layer, norm) for p in module.parameters()]
    folded, place = fold_norm(layer, norm)
    own = [p.numel() for p in place.parameters(recurse=False)]
    assert sum(own) + sum(p.numel() for p in folded.parameters()) == sum(before)
    # The output is a copy, so it may be modified in place.
    images = torch.randn(1, 5, 4, 4)
    assert place(images) is not images and torch.equal(place(images), images)


def test_changes_go_to_the_weight_and_to_beta() -> None:
    layer, norm = pair()
    folded, place = fold_norm(layer, norm)
    folded.weight[1, 2] += 0.5
    folded.bias[3] += 0.25
    images = torch.randn(2, 6, 7, 7)
    wanted = folded(images)
    again, after = unfold_norm(folded, place)
    torch.testing.assert_close(after(again(images)), wanted, atol=1e-5, rtol=1e-5)
    for name in ("weight", "running_mean", "running_var"):
        assert torch.equal(getattr(after, name), getattr(norm, name))
    same = torch.ones_like(layer.weight, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(again.weight[same], layer.weight[same])
    assert torch.equal(after.bias[[0, 1, 2, 4]], norm.bias[[0, 1, 2, 4]])
    # The originals are as they were.
    assert torch.equal(place.bias, norm.bias) and torch.equal(place.weight, norm.weight)


def test_a_scale_of_zero_is_reset_when_its_row_changes() -> None:
    layer, norm = pair()
    norm.weight[[0, 4]] = 0.0
    folded, place = fold_norm(layer, norm)
    folded.weight[4, 1] += 0.5
    folded.bias[4] -= 1.0
    images = torch.randn(2, 6, 7, 7)
    wanted = folded(images)
    again, after = unfold_norm(folded, place)
    torch.testing.assert_close(after(again(images)), wanted, atol=1e-5, rtol=1e-5)
    assert after.weight[0] == 0 and torch.equal(again.weight[0], layer.weight[0])
