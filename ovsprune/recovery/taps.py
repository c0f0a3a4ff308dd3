"""What the recoveries without gradients share: what was cut where, and how long its rows are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ovsprune.calibration.refit import squared_norms
from ovsprune.calibration.streams import Stream, spread_over, walk
from ovsprune.core.protocols import RecoveryContext
from ovsprune.core.records import Group

__all__ = ["Tap", "cut_groups", "median_norms", "target_of"]

Tap = tuple[str, str]
"""Dotted name of a layer, and its ``"input"`` or ``"output"``."""

_SAMPLED = 32
"""Pictures on which a median is taken."""


def cut_groups(item: RecoveryContext, block: str) -> list[Group]:
    """Groups of ``block`` of which the plan does not keep everything."""
    return [g for g in item.groups if g.block == block and item.plan.width(g.name) < g.units]


def target_of(group: Group) -> Tap:
    """Where the consumer's effect is read: the residual stream after it, or its own output."""
    if group.stream is None:
        return group.consumer, "output"
    return group.stream.module, group.stream.side


def median_norms(
    block: nn.Module,
    stream: Stream,
    batch_size: int,
    name: str,
    points: Sequence[tuple[Tap, Callable[[Tensor], Tensor]]],
) -> list[float]:
    """Medians of the rows' squared norms at some points of a block, on at most 32 pictures.

    Args:
        block: Of the dense tower.
        stream: Before it.
        batch_size: Pictures at a time.
        name: The block's dotted name.
        points: Taps, and the rows of the tensor there that are meant, [b, ..., k].
    """
    sample = Stream(stream[spread_over(len(stream), _SAMPLED)])
    norms: list[list[Tensor]] = [[] for _ in points]
    for _, seen in walk(block, sample, batch_size, [tap for tap, _ in points], name):
        for found, (tap, chosen) in zip(norms, points, strict=True):
            found.append(squared_norms(chosen(seen[tap])).flatten().cpu())
    return [float(torch.cat(found).median()) for found in norms]
