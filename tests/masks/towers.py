"""Small tower, a model that contains it, and masks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tower(nn.Module):
    """Convolution and two equal blocks; ``seed`` gives other weights of the architecture."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 4, 2)
            blocks = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2)]
            self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> Tensor:
        stream: Tensor = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            stream = stream + block(stream)
        return stream


def holding(place: str, tower: nn.Module) -> nn.Module:
    """Return a model with ``tower`` at the dotted name ``place``, and another layer."""
    model: nn.Module = tower
    for name in reversed(place.split(".")):
        outer = nn.Module()
        outer.add_module(name, model)
        outer.add_module("head", nn.Linear(4, 6))
        model = outer
    return model


def random_masks(tower: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return masks of all weights with two or more axes, about half of each kept."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator) > 0.5
        for name, p in tower.named_parameters()
        if p.ndim > 1
    }
