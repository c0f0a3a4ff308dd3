"""Copies whose hooks know the copy, and which may be made after a forward pass with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.graph.copies import copy_model


class Listening(nn.Module):
    """A model whose hooks write into it, by a closure and by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.heard: list[Tensor] = []
        self.before: list[Tensor] = []
        other = "not a module"
        self.first.register_forward_hook(lambda m, given, out: self.hear(out, other))
        self.second.register_forward_pre_hook(self.keep)

    def hear(self, out: Tensor, other: str) -> None:
        assert other == "not a module"
        self.heard.append(out)

    def keep(self, module: nn.Module, given: Any) -> None:
        self.before.append(given[0])

    def forward(self, x: Tensor) -> Tensor:
        self.heard, self.before = [], []
        out: Tensor = self.second(self.first(x))
        return out


def test_hooks_of_a_copy_write_into_the_copy() -> None:
    model, x = Listening(), torch.ones(2, 3)
    clone = copy_model(model)
    wanted = model(x)
    mine = model.heard[0]
    assert torch.equal(clone(x), wanted)
    assert len(clone.heard) == len(clone.before) == 1 == len(model.heard)
    assert model.heard[0] is mine and clone.heard[0] is not mine
    assert all(a is not b for a, b in zip(clone.parameters(), model.parameters(), strict=True))


def test_a_copy_is_made_after_a_pass_with_gradients() -> None:
    model = Listening()
    model(torch.ones(2, 3))
    assert not model.heard[0].is_leaf
    clone = copy_model(model)
    assert clone.heard[0].is_leaf and torch.equal(clone.heard[0], model.heard[0])
    clone(torch.zeros(2, 3))
    assert not torch.equal(clone.heard[0], model.heard[0])


def test_parts_may_stand_in() -> None:
    model = nn.Linear(2, 2)
    weight = nn.Parameter(torch.empty(2, 2, device="meta"))
    assert copy_model(model, {id(model.weight): weight}).weight is weight
