"""A linear map that may have nothing to read, or nothing to give."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["linear"]


def linear(inputs: int, outputs: int, bias: bool = True, device: str | None = None) -> nn.Linear:
    """``nn.Linear``, which warns of a weight without entries; of a layer that lost all its units.

    Args:
        inputs: Without any, what it gives is its bias.
        outputs: Channels that it gives.
        bias: Whether it has one.
        device: Of the parameters.
    """
    layer = nn.Linear(max(inputs, 1), max(outputs, 1), bias, device=device)
    if not inputs or not outputs:
        layer.weight = nn.Parameter(torch.empty(outputs, inputs, device=device))
        if bias:
            layer.bias = nn.Parameter(torch.zeros(outputs, device=device))
        layer.in_features, layer.out_features = inputs, outputs
    return layer
