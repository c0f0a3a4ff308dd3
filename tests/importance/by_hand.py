"""Minimal groups: one layer that computes the units, one that reads them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ovsprune.core.protocols import GroupContext, Moments
from ovsprune.core.records import Group, Slice


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.T.shape, bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def context(
    make: Tensor,
    read: Tensor,
    *,
    width: int = 1,
    scale: Tensor | None = None,
    covariance: Tensor | None = None,
    mean: Tensor | None = None,
    gradients: Tensor | None = None,
) -> GroupContext:
    """Build a group of units of ``width`` channels.

    Args:
        make: Weight [n, d] of the layer that computes the n channels.
        read: Weight [m, n] of the consumer.
        width: Channels per unit.
        scale: Scales [n] of a norm between the two layers.
        covariance: Covariance of the consumer's input, [n, n].
        mean: Mean of the consumer's input, [n].
        gradients: [samples, units].
    """
    n = len(make)
    rows = torch.arange(n).view(-1, width)
    layers: dict[str, nn.Module] = {"make": linear(make), "read": linear(read)}
    slices = [Slice("make", "out", rows), Slice("read", "in", rows)]
    if scale is not None:
        norm = nn.LayerNorm(n)
        norm.weight = nn.Parameter(scale.clone())
        layers["norm"] = norm
        slices.append(Slice("norm", "out", rows))
    group = Group(
        "g", "mlp", len(rows), tuple(slices), "read", "block", norms=("norm",) * (scale is not None)
    )
    moments = None
    if covariance is not None:
        means = torch.zeros(n, dtype=torch.float64) if mean is None else mean.double()
        moments = Moments(100, means, covariance.double())
    return GroupContext(
        group, layers, moments, 1e-2, torch.Generator().manual_seed(0), (), gradients
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
