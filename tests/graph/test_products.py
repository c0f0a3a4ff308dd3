"""Weights that multiply activations: order of use and MACs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ovsprune.graph.products import find_products


class Odd(nn.Module):
    """Layers registered out of order, with a position, a norm, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)
        self.position = nn.Embedding(16, 4)
        self.norm = nn.LayerNorm(4)
        self.first = nn.Conv2d(3, 4, 2, stride=2)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.proj = nn.Parameter(torch.randn(2, 2))

    def forward(self, images: Tensor) -> Tensor:
        stream = self.grouped(self.first(images)).flatten(2).transpose(1, 2)
        stream = self.norm(stream + self.position.weight)
        return torch.relu(self.last(self.last.weight.new_ones(1) * stream)) @ self.proj


def test_weights_are_listed_in_the_order_of_use_with_their_macs() -> None:
    products = find_products(Odd(), (8, 8))
    assert [(p.name, p.shape, p.macs) for p in products] == [
        ("first.weight", (4, 3, 2, 2), 16 * 4 * 12),
        ("grouped.weight", (4, 1, 3, 3), 16 * 4 * 9),
        ("last.weight", (2, 4), 16 * 8),
    ]
