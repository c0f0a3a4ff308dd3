"""MACs and parameters of a model.

MACs are half of the FLOPs that torch's ``FlopCounterMode`` counts without fused attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ovsprune.core.flops import unfused_attention
from ovsprune.core.records import Costs
from ovsprune.graph.copies import copy_model

__all__ = ["count_costs", "countable", "macs", "on_meta"]

COUNT_ON = "meta"
"""Device of the towers whose operations are counted. Meta tensors need no memory and no work."""


def macs(module: nn.Module, *inputs: Any, **named: Any) -> int:
    """Return the multiply-accumulate operations of ``module(*inputs, **named)``."""
    with unfused_attention(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs, **named)
    return int(counter.get_total_flops()) // 2


def count_costs(tower: nn.Module, size: tuple[int, int]) -> Costs:
    """Return the costs of one forward pass of ``tower`` on one image.

    The count runs on a copy without weights: the tower is not modified.

    Args:
        tower: Image tower.
        size: Height and width of the image in pixels.
    """
    return Costs(macs(*countable(tower, size)), sum(p.numel() for p in tower.parameters()))


def countable(tower: nn.Module, size: tuple[int, int]) -> tuple[nn.Module, Tensor]:
    """Return a copy of ``tower`` without weights, and an image [1, 3, H, W], for :func:`macs`."""
    return on_meta(tower, COUNT_ON), torch.empty(1, 3, *size, device=COUNT_ON)


def on_meta(tower: nn.Module, device: str = "meta") -> nn.Module:
    """Return a copy of ``tower`` on the meta device, without copying its weights.

    Another ``device`` gives a copy whose weights are zeros.
    """
    memo: dict[int, Any] = {}
    for tensor in (*tower.parameters(), *tower.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # Zeros are valid indices, where a buffer holds indices.
        zeros = torch.zeros_like(tensor, device=device, dtype=dtype)
        # No gradients: the FLOP counter cannot follow views of parameters that require them.
        memo[id(tensor)] = nn.Parameter(zeros, False) if isinstance(tensor, nn.Parameter) else zeros
    return copy_model(tower, memo).eval()
