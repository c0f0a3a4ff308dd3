"""Layer scales folded into the layer before them, and unfolded again."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from ovsprune.graph.scales import fold_scale, unfold_scale


def pair(kind: str, bias: bool = True) -> tuple[nn.Module, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(6, 5, bias=bias) if kind == "linear" else nn.Conv2d(6, 5, 1, bias=bias)
    gamma = torch.empty(5).uniform_(-2, 2, generator=generator)
    gamma = gamma.view(5, 1, 1) if kind == "map" else gamma
    return layer.requires_grad_(False), nn.Parameter(gamma, requires_grad=False)


def scaled(layer: nn.Module, gamma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
    out: torch.Tensor = gamma.view(shape) * layer(x)
    return out


def read(kind: str) -> torch.Tensor:
    return torch.randn(3, 6) if kind == "linear" else torch.randn(3, 6, 4, 4)


@pytest.mark.parametrize("kind", ["linear", "conv", "map"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_folded_layer_equals_layer_and_scale(kind: str, bias: bool) -> None:
    layer, gamma = pair(kind, bias)
    x = read(kind)
    folded, place = fold_scale(layer, gamma)
    torch.testing.assert_close(place(folded(x)), scaled(layer, gamma, x), atol=1e-6, rtol=1e-5)
    assert (folded.bias is not None) is bias and not folded.weight.requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv", "map"])
@pytest.mark.parametrize("columns", [None, torch.tensor([0, 2, 5])])
def test_unchanged_rows_are_restored_bit_for_bit(kind: str, columns: torch.Tensor | None) -> None:
    layer, gamma = pair(kind)
    gamma[1], gamma[2] = 0.0, 1e-6
    folded, place = fold_scale(layer, gamma)
    if columns is not None:
        folded.weight = nn.Parameter(folded.weight[:, columns].clone(), requires_grad=False)
    again, after = unfold_scale(folded, deepcopy(place), columns)
    assert torch.equal(again.weight, layer.weight if columns is None else layer.weight[:, columns])
    assert torch.equal(again.bias, layer.bias) and torch.equal(after, gamma)
    assert after is not gamma and not after.requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv", "map"])
def test_changes_go_to_the_layer_and_not_to_the_scale(kind: str) -> None:
    layer, gamma = pair(kind)
    folded, place = fold_scale(layer, gamma)
    folded.weight[1, 2] += 0.1
    folded.bias[3] += 0.1
    x = read(kind)
    again, after = unfold_scale(folded, place)
    torch.testing.assert_close(scaled(again, after, x), folded(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(after, gamma)
    assert torch.equal(again.weight[[0, 2, 4]], layer.weight[[0, 2, 4]])
    assert not torch.equal(again.weight[1], layer.weight[1])


@pytest.mark.parametrize("kind", ["linear", "map"])
@pytest.mark.parametrize("tiny", [0.0, 1e-6, -1e-6])
def test_a_change_behind_a_tiny_scale_increases_the_scale(tiny: float, kind: str) -> None:
    layer, gamma = pair(kind)
    gamma[[0, 4]] = tiny
    folded, place = fold_scale(layer, gamma)
    folded.weight[4, 1] += 0.5
    folded.bias[4] -= 1.0
    x = read(kind)
    again, after = unfold_scale(folded, place)
    torch.testing.assert_close(scaled(again, after, x), folded(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(after[:4], gamma[:4]) and torch.equal(again.weight[:4], layer.weight[:4])
    # The row keeps its norm, so that it still fits half precision.
    lengths = [torch.cat([m.weight[4].flatten(), m.bias[4:]]).norm() for m in (layer, again)]
    torch.testing.assert_close(lengths[1], lengths[0])


def test_a_changed_row_of_zeros_behind_a_scale_of_zero_is_finite() -> None:
    layer, gamma = pair("linear")
    layer.weight[2], layer.bias[2], gamma[2] = 0.0, 0.0, 0.0
    folded, place = fold_scale(layer, gamma)
    folded.weight[2, 0] = 3.0
    again, after = unfold_scale(folded, place)
    x = read("linear")
    torch.testing.assert_close(scaled(again, after, x), folded(x), atol=1e-6, rtol=1e-5)
    assert all(t.isfinite().all() for t in (again.weight, again.bias, after))
