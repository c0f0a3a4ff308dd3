"""MACs and parameters of a model.

MACs are half of the FLOPs that torch's ``FlopCounterMode`` counts without fused attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ovsprune.core.flops import unfused_attention
from ovsprune.core.records import Costs
from ovsprune.graph.copies import copy_model

__all__ = ["count_costs", "macs", "on_meta"]


def macs(module: nn.Module, *inputs: Any, **named: Any) -> int:
    """Return the multiply-accumulate operations of ``module(*inputs, **named)``."""
    with unfused_attention(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs, **named)
    return int(counter.get_total_flops()) // 2


def count_costs(tower: nn.Module, size: tuple[int, int]) -> Costs:
    """Return the costs of one forward pass of ``tower`` on one image.

    The count runs on meta tensors: no weight is modified and nothing is computed.

    Args:
        tower: Image tower.
        size: Height and width of the image in pixels.
    """
    meta_tower = on_meta(tower)
    image = torch.empty(1, 3, *size, device="meta")
    return Costs(macs(meta_tower, image), sum(p.numel() for p in tower.parameters()))


def on_meta(tower: nn.Module) -> nn.Module:
    """Return a copy of ``tower`` on the meta device, without copying its weights."""
    memo: dict[int, Any] = {}
    for tensor in (*tower.parameters(), *tower.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=dtype)
        # No gradients: the FLOP counter cannot follow views of parameters that require them.
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy_model(tower, memo).eval()
