"""Tests of global magnitude pruning."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import prune

from ovsprune.masks.magnitude import RATE, keep_largest, kept_by_round


def ones(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}


def test_layers_are_ranked_together() -> None:
    weights = {
        "a.weight": torch.tensor([[0.9, -0.1], [0.4, -3.0]]),
        "b.weight": torch.tensor([[[[-0.2]]], [[[0.5]]]]),
    }
    found = keep_largest(weights, ones(weights), 3)
    assert found["a.weight"].tolist() == [[True, False], [False, True]]
    assert found["b.weight"].flatten().tolist() == [False, True]


def test_count_is_exact_among_equal_weights() -> None:
    weights = {"a": torch.ones(4), "b": torch.tensor([1.0, 2.0, -1.0])}
    for keep in range(8):
        found = keep_largest(weights, ones(weights), keep)
        assert sum(int(m.sum()) for m in found.values()) == keep
    assert keep_largest(weights, ones(weights), 2)["b"].tolist() == [False, True, True]


def test_removed_weights_stay_removed() -> None:
    weights = {"a": torch.tensor([5.0, 1.0, 2.0, 3.0])}
    masks = {"a": torch.tensor([False, True, True, True])}
    assert keep_largest(weights, masks, 2)["a"].tolist() == [False, False, True, True]
    assert masks["a"].tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="4 weights cannot be kept of the 3 that remain"):
        keep_largest(weights, masks, 4)


@pytest.mark.parametrize("total", [10, 997, 12345, 85_524_480])
def test_rounds_are_exact_to_one_weight(total: int) -> None:
    kept = kept_by_round(total, 0.9)
    assert kept == sorted(set(kept), reverse=True) or total == 10
    for number, left in enumerate(kept[:-1], start=1):
        assert abs(left - total * (1 - RATE) ** number) <= 1
    assert kept[-1] == round(total * (1 - 0.9))


@pytest.mark.parametrize("total", [1000, 552_960, 23_454_912, 12_345_677])
@pytest.mark.parametrize("rounds", [1, 2, 7, 22])
def test_number_of_rounds_is_minimal(total: int, rounds: int) -> None:
    kept = kept_by_round(total, 1 - 0.9**rounds)
    assert len(kept) == rounds
    assert abs(kept[-1] - total * 0.9**rounds) <= 1


def test_one_round_equals_torch() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(20, 10)]
    weights = {str(i): layer.weight.detach().clone() for i, layer in enumerate(layers)}
    prune.global_unstructured(
        [(layer, "weight") for layer in layers], prune.L1Unstructured, amount=100
    )
    total = sum(w.numel() for w in weights.values())
    found = keep_largest(weights, ones(weights), total - 100)
    for i, layer in enumerate(layers):
        assert torch.equal(found[str(i)], layer.weight_mask.bool())
