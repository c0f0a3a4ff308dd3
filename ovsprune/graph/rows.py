"""Activations as the rows of a linear map, whatever type the layer has.

Every layer that can be refitted is ``y = W x + b`` at each position of its output: W is the weight
flattened to [m, n], x the n numbers that the position reads. For a matrix x is a token; for a
convolution it is a patch, channel by channel.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.graph.layers import weight_of

__all__ = ["flat_columns", "input_rows", "output_from_rows", "output_rows", "reads_all_channels"]


def input_rows(layer: nn.Module, read: Tensor) -> Tensor:
    """What ``layer`` reads, as rows.

    Args:
        layer: A matrix [m, n], or a convolution [m, channels, ...] for which
            :func:`reads_all_channels` holds.
        read: Its input, [b, ..., n] or [b, channels, ...].

    Returns:
        [b, ..., n], so that ``rows @ weight.flatten(1).T + bias`` is what :func:`output_rows` makes
        of the output. For a convolution n is channels times taps, channel by channel.
    """
    if weight_of(layer).ndim == 2:
        return read
    return (read if _pointwise(layer) else _patches(layer, read)).movedim(1, -1)


def output_rows(layer: nn.Module, given: Tensor) -> Tensor:
    """What ``layer`` gives, or anything of that layout, as rows [b, ..., m]."""
    return given if weight_of(layer).ndim == 2 else given.movedim(1, -1)


def output_from_rows(layer: nn.Module, rows: Tensor) -> Tensor:
    """The inverse of :func:`output_rows`."""
    return rows if weight_of(layer).ndim == 2 else rows.movedim(-1, 1)


def flat_columns(layer: nn.Module, columns: Tensor) -> Tensor:
    """Columns of the flattened weight that belong to input channels.

    Args:
        layer: Reads the channels.
        columns: int64 [units, width], channels.

    Returns:
        int64 [units, width * taps]; the same for a matrix, whose channels have one tap each.
    """
    taps = weight_of(layer)[0, 0].numel()
    return (columns[..., None] * taps + torch.arange(taps)).flatten(1)


def reads_all_channels(layer: nn.Module) -> bool:
    """Whether each output reads every input channel: not so in a grouped convolution."""
    return int(getattr(layer, "groups", 1)) == 1


def _pointwise(layer: nn.Module) -> bool:
    """Whether the positions of input and output are the same."""
    conv: Any = layer
    padded = any(conv.padding) if isinstance(conv.padding, tuple) else False
    return weight_of(layer)[0, 0].numel() == 1 and set(conv.stride) == {1} and not padded


def _patches(layer: nn.Module, read: Tensor) -> Tensor:
    """Patches [b, channels * taps, ...], cut out by the layer's own forward.

    A convolution whose groups are single channels and whose kernels pick one tap each; stride,
    dilation and padding, also that of subclasses, are the layer's.
    """
    kernel = weight_of(layer).shape[2:]
    taps, channels = kernel.numel(), read.shape[1]
    one = torch.eye(taps, device=read.device, dtype=read.dtype).view(taps, 1, *kernel)
    probe: Any = copy.copy(layer)
    weight = nn.Parameter(one.repeat(channels, *[1] * (one.ndim - 1)), requires_grad=False)
    probe._parameters = {"weight": weight, "bias": None}
    probe.groups = probe.in_channels = channels
    probe.out_channels = channels * taps
    patches: Tensor = probe.forward(read)
    return patches
