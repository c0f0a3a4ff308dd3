"""Linear layers that may have zero inputs or zero outputs."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["linear"]


def linear(inputs: int, outputs: int, bias: bool = True, device: str | None = None) -> nn.Linear:
    """Build an ``nn.Linear`` that may have no units.

    ``nn.Linear`` itself warns when it initialises an empty weight, so a layer whose units are all
    removed gets its parameters here. With 0 ``inputs``, its output is the bias.
    """
    # At least 1, so that nn.Linear initialises a nonempty weight, which is replaced below.
    layer = nn.Linear(max(inputs, 1), max(outputs, 1), bias, device=device)
    if not inputs or not outputs:
        layer.weight = nn.Parameter(torch.empty(outputs, inputs, device=device))
        if bias:
            layer.bias = nn.Parameter(torch.zeros(outputs, device=device))
        layer.in_features, layer.out_features = inputs, outputs
    return layer
