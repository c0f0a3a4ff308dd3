"""Costs as this project counts them: FLOPs / 2 of torch's FlopCounterMode, fast path off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ovsprune.core.flops import slow_path
from ovsprune.core.records import Costs
from ovsprune.graph.copies import copied

__all__ = ["count_costs", "macs", "on_meta"]


def macs(module: nn.Module, *inputs: Any, **named: Any) -> int:
    """Multiply-accumulates of ``module(*inputs, **named)``."""
    with slow_path(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs, **named)
    return int(counter.get_total_flops()) // 2


def count_costs(tower: nn.Module, size: tuple[int, int]) -> Costs:
    """Costs of one picture of ``size`` (height, width) pixels through ``tower``.

    Counted on meta tensors: no weight is touched and no arithmetic is done.
    """
    shell = on_meta(tower)
    image = torch.empty(1, 3, *size, device="meta")
    return Costs(macs(shell, image), sum(p.numel() for p in tower.parameters()))


def on_meta(tower: nn.Module) -> nn.Module:
    """A copy of ``tower`` on the meta device, made without copying its weights."""
    memo: dict[int, Any] = {}
    for tensor in (*tower.parameters(), *tower.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=dtype)
        # Without gradients: the counter cannot follow a view of a parameter that wants one.
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copied(tower, memo).eval()
