"""Inputs and outputs of a layer as rows, so that linear layers and convolutions are treated alike.

Every layer that can be refitted computes ``y = W x + b`` at each output position. W is the weight
flattened to [m, n], and x holds the n inputs of that position: a token for a linear layer, a patch
(channel by channel) for a convolution.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.graph.layers import weight_of

__all__ = ["flat_columns", "input_rows", "output_from_rows", "output_rows", "reads_all_channels"]


def input_rows(layer: nn.Module, read: Tensor) -> Tensor:
    """Return the input of ``layer`` as rows.

    Args:
        layer: Linear layer (weight [m, n]), or convolution (weight [m, channels, ...]) for which
            :func:`reads_all_channels` is true.
        read: Its input, [b, ..., n] or [b, channels, ...].

    Returns:
        [b, ..., n], such that ``rows @ weight.flatten(1).T + bias`` equals :func:`output_rows` of
        the layer's output. For a convolution n = channels * kernel positions, channel by channel.
    """
    if weight_of(layer).ndim == 2:
        return read
    return (read if _pointwise(layer) else _patches(layer, read)).movedim(1, -1)


def output_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """Return an output of ``layer``, or a tensor of the same layout, as rows [b, ..., m]."""
    return output if weight_of(layer).ndim == 2 else output.movedim(1, -1)


def output_from_rows(layer: nn.Module, rows: Tensor) -> Tensor:
    """Return rows [b, ..., m] in the layout of the layer's output (inverse of output_rows)."""
    return rows if weight_of(layer).ndim == 2 else rows.movedim(-1, 1)


def flat_columns(layer: nn.Module, columns: Tensor) -> Tensor:
    """Return the columns of the flattened weight [m, n] that belong to input channels.

    Args:
        layer: Layer that reads the channels.
        columns: int64 [units, width], input channels.

    Returns:
        int64 [units, width * taps], where taps is the number of kernel positions (1 for a linear
        layer).
    """
    taps = weight_of(layer)[0, 0].numel()
    # [units, width, 1] + [taps] -> [units, width, taps] -> [units, width * taps]
    return (columns[..., None] * taps + torch.arange(taps)).flatten(1)


def reads_all_channels(layer: nn.Module) -> bool:
    """Return True if each output reads every input channel (False for a grouped convolution)."""
    return int(getattr(layer, "groups", 1)) == 1


def _pointwise(layer: nn.Module) -> bool:
    """Return True if each output position of a convolution reads the same input position only."""
    conv: Any = layer
    padded = any(conv.padding) if isinstance(conv.padding, tuple) else False
    return weight_of(layer)[0, 0].numel() == 1 and set(conv.stride) == {1} and not padded


def _patches(layer: nn.Module, read: Tensor) -> Tensor:
    """Return the patches [b, channels * taps, ...] that a convolution reads.

    They are the output of a depthwise copy of the layer with one-hot kernels, one per kernel
    position. So stride, dilation and padding, also those of subclasses, are the layer's own.
    """
    kernel = weight_of(layer).shape[2:]
    taps, channels = kernel.numel(), read.shape[1]
    one_hot = torch.eye(taps, device=read.device, dtype=read.dtype).view(taps, 1, *kernel)
    extractor: Any = copy.copy(layer)
    weight = nn.Parameter(  # [channels * taps, 1, *kernel]
        one_hot.repeat(channels, *[1] * (one_hot.ndim - 1)), requires_grad=False
    )
    extractor._parameters = {"weight": weight, "bias": None}
    extractor.groups = extractor.in_channels = channels
    extractor.out_channels = channels * taps
    patches: Tensor = extractor.forward(read)
    return patches
