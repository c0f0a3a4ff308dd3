"""What reads a residual stream behind the last block, refitted where the stream lost channels.

What channels that are gone gave to it can be told in part from those that are left, as for the
layers inside blocks; but no group's consumer is among them, and nothing comes after that could make
up for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ovsprune.calibration.refit import Refit, held_out, median_of, row_weights, squared_norms
from ovsprune.core.protocols import RecoveryContext, Stages
from ovsprune.core.records import Slice
from ovsprune.graph.layers import find, weight_of
from ovsprune.graph.rows import given_rows, read_rows

__all__ = ["refit_readers"]


@torch.no_grad()
def refit_readers(item: RecoveryContext) -> None:
    """Refit, in place, the layers behind the blocks that read a stream which lost channels.

    Each is aimed at what it gives in the dense tower, from what it reads in the slim one, as
    ``closed-form`` does inside the blocks (:class:`ovsprune.calibration.refit.Refit`).
    """
    dense, slim = item.stages(item.dense), item.stages(item.slim)
    for part in _behind(item, dense):
        layer, before = (_linear(find(tower, part.module)) for tower in (item.slim, item.dense))
        refit = Refit(layer, held_out(len(item.pictures)), item.ridge)
        median: float | None = None
        start = 0
        for images in item.pictures.batches(item.batch_size):
            rows = slice(start, start + len(images))
            start += len(images)
            both = (_read(t, s, part, images) for t, s in ((item.dense, dense), (item.slim, slim)))
            for wanted, read in zip(*both, strict=True):
                goal = given_rows(before, before(wanted))
                median = float(median_of(squared_norms(goal))) if median is None else median
                residual = goal - given_rows(layer, layer(read))
                refit.update(rows, read_rows(layer, read), residual, row_weights(goal, median))
        refit.apply()
        place = find(item.slim, part.module)
        if isinstance(place, nn.Parameter):
            place.copy_(weight_of(layer).T)


def _behind(item: RecoveryContext, stages: Stages) -> Iterator[Slice]:
    """The readers outside of the blocks, of streams that lost channels."""
    for group in item.groups:
        if group.across and item.plan.width(group.name) < group.units:
            for part in group.readers:
                if not any(_source(part).startswith(f"{block}.") for block in stages.blocks):
                    yield part


def _source(part: Slice) -> str:
    """The layer at which what is read can be seen."""
    return part.behind or part.module


def _read(tower: nn.Module, stages: Stages, part: Slice, images: Tensor) -> list[Tensor]:
    """What a reader reads of some pictures, call by call."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append(args[0] if part.behind is None else out)

    layer = tower.get_submodule(_source(part))
    handle = layer.register_forward_hook(hook)
    try:
        stages.outputs(images.to(weight_of(layer).device))
    finally:
        handle.remove()
    return seen


def _linear(part: nn.Module | nn.Parameter) -> nn.Module:
    """The layer; or a parameter [n, m] as the layer that multiplies by it."""
    if isinstance(part, nn.Module):
        return part
    inputs, outputs = part.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(part.detach().T.clone(), requires_grad=False)
    return layer
