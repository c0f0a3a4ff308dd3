"""Linear layers that may have zero inputs or zero outputs."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["linear"]


def linear(inputs: int, outputs: int, bias: bool = True, device: str | None = None) -> nn.Linear:
    """Build an ``nn.Linear`` that may have no units.

    ``nn.Linear`` itself warns when it initialises an empty weight, so a layer whose units are all
    removed gets its parameters here.

    Args:
        inputs: Input channels; with 0 the output is the bias.
        outputs: Output channels, at least 0.
        bias: True if the layer has a bias.
        device: Device of the parameters.
    """
    layer = nn.Linear(max(inputs, 1), max(outputs, 1), bias, device=device)
    if not inputs or not outputs:
        layer.weight = nn.Parameter(torch.empty(outputs, inputs, device=device))
        if bias:
            layer.bias = nn.Parameter(torch.zeros(outputs, device=device))
        layer.in_features, layer.out_features = inputs, outputs
    return layer
