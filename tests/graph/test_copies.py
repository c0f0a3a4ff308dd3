"""Copies of models with hooks, and of models after a forward pass with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.graph.copies import copy_model


class Recording(nn.Module):
    """Model whose hooks write into it, by a closure and by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outputs: list[Tensor] = []
        self.inputs: list[Tensor] = []
        other = "not a module"
        self.first.register_forward_hook(lambda m, args, out: self.record(out, other))
        self.second.register_forward_pre_hook(self.keep)

    def record(self, out: Tensor, other: str) -> None:
        assert other == "not a module"
        self.outputs.append(out)

    def keep(self, module: nn.Module, args: Any) -> None:
        self.inputs.append(args[0])

    def forward(self, x: Tensor) -> Tensor:
        self.outputs, self.inputs = [], []
        out: Tensor = self.second(self.first(x))
        return out


def test_hooks_of_a_copy_write_into_the_copy() -> None:
    model, x = Recording(), torch.ones(2, 3)
    clone = copy_model(model)
    wanted = model(x)
    mine = model.outputs[0]
    assert torch.equal(clone(x), wanted)
    assert len(clone.outputs) == len(clone.inputs) == 1 == len(model.outputs)
    assert model.outputs[0] is mine and clone.outputs[0] is not mine
    assert all(a is not b for a, b in zip(clone.parameters(), model.parameters(), strict=True))


def test_copy_after_a_forward_pass_with_gradients() -> None:
    model = Recording()
    model(torch.ones(2, 3))
    assert not model.outputs[0].is_leaf
    clone = copy_model(model)
    assert clone.outputs[0].is_leaf and torch.equal(clone.outputs[0], model.outputs[0])
    clone(torch.zeros(2, 3))
    assert not torch.equal(clone.outputs[0], model.outputs[0])


def test_the_memo_replaces_parts_of_the_copy() -> None:
    model = nn.Linear(2, 2)
    weight = nn.Parameter(torch.empty(2, 2, device="meta"))
    assert copy_model(model, {id(model.weight): weight}).weight is weight
