"""What each channel of a residual stream matters to the layers that read it.

A layer ``y = W x`` that loses channel c loses ``W_c x_c``, of the energy ``E[x_c^2] |W_c|^2`` (the
squared score by which Wanda ranks single weights, Sun et al. 2024, summed over a column). A stream
has many readers, whose outputs have scales of their own; so each reader counts by the share that
the channel has in the sum over all channels, and a channel by the mean of its shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Pictures, Stages
from ovsprune.core.records import Group, Slice
from ovsprune.graph.layers import find, input_axis, weight_axis, weight_of

__all__ = ["stream_energies"]


@torch.no_grad()
def stream_energies(
    tower: nn.Module,
    stages: Stages,
    groups: Sequence[Group],
    pictures: Pictures,
    *,
    batch_size: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """Group name to float64 [units], the sum being 1, of every group that lies across blocks.

    Args:
        tower: The rewritten tower.
        stages: Its blocks.
        groups: Those of streams, and others, which are passed over.
        pictures: Calibration pictures.
        batch_size: Pictures at a time.
        progress: Shows the work.
    """
    streams = [group for group in groups if group.across]
    if not streams:
        return {}
    powers: dict[str, Tensor] = {}
    handles = []
    for part in (part for group in streams for part in group.readers):
        layer = tower.get_submodule(part.behind or part.module)
        handles.append(layer.register_forward_hook(_adder(tower, part, powers)))
    device = next(tower.parameters()).device
    try:
        with progress.stage("channels of the stream", len(pictures)) as advance:
            for images in pictures.batches(batch_size):
                stages.outputs(images.to(device))
                advance(len(images))
    finally:
        for handle in handles:
            handle.remove()
    return {group.name: _shares(tower, group, powers) for group in streams}


def _adder(
    tower: nn.Module, part: Slice, powers: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that adds up the squares of what a slice's layer reads, channel by channel."""
    layer = find(tower, part.module)
    axis = input_axis(layer) if isinstance(layer, nn.Module) else -1

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        read = (args[0] if part.behind is None else out).movedim(axis, -1)
        power = read.flatten(0, -2).square().sum(0, dtype=torch.float64).cpu()
        powers[part.module] = powers.get(part.module, 0.0) + power

    return hook


def _shares(tower: nn.Module, group: Group, powers: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(group.units, dtype=torch.float64)
    for part in group.readers:
        layer = find(tower, part.module)
        columns = weight_of(layer).detach().movedim(weight_axis(layer, "in"), 0).flatten(1)
        energy = powers[part.module] * columns.double().square().sum(1).cpu()
        energy = energy[part.rows].sum(1)
        total += energy / energy.sum().clamp_min(1e-300)
    mean: Tensor = total / len(group.readers)
    return mean
