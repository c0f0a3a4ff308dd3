"""One walk through the dense tower: what the consumers of cut groups read and give there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ovsprune.calibration.streams import run_stem, walk
from ovsprune.core.protocols import RecoveryContext
from ovsprune.core.records import Group
from ovsprune.graph.layers import input_axis
from ovsprune.graph.rows import given_rows
from ovsprune.recovery.taps import cut_groups, median_norms, target_of

__all__ = ["Seen", "consumers_of"]


@dataclass(frozen=True, eq=False)
class Seen:
    """One batch at one consumer of the dense tower.

    Attributes:
        group: The cut group.
        part: Pictures of the batch.
        kept: Of what the consumer reads, the channels of the kept units: what the slim one reads.
        output: What it gives, as rows [b, ..., m].
        target: The residual stream after it, or its output, as rows [b, ..., m].
        median: Of the squared norms of the rows of ``target``.
    """

    group: Group
    part: slice
    kept: Tensor
    output: Tensor
    target: Tensor
    median: float


def consumers_of(item: RecoveryContext, description: str) -> Iterator[Seen]:
    """Every batch of calibration pictures at the consumer of every cut group, block after block.

    Args:
        item: The recovery's context; nothing is run where nothing was cut.
        description: Of the stage that the progress shows.
    """
    stages = item.stages(item.dense)
    last = max((i for i, name in enumerate(stages.blocks) if cut_groups(item, name)), default=-1)
    if last < 0:
        return
    with item.progress.stage(description, last + 2) as advance:
        stream = run_stem(stages, item.pictures, item.batch_size)
        advance(1)
        for name, block in list(stages.blocks.items())[: last + 1]:
            groups = cut_groups(item, name)
            points = [target_of(g) for g in groups]
            layers = [item.dense.get_submodule(g.consumer) for g in groups]
            rows = [partial(given_rows, layer) for layer in layers]
            medians = median_norms(
                block, stream, item.batch_size, name, list(zip(points, rows, strict=True))
            )
            taps = [(g.consumer, side) for g in groups for side in ("input", "output")]
            for part, seen in walk(
                block, stream, item.batch_size, [*taps, *points], name, advance=True
            ):
                for group, layer, point, median in zip(
                    groups, layers, points, medians, strict=True
                ):
                    yield Seen(
                        group,
                        part,
                        _kept(item, group, layer, seen[group.consumer, "input"]),
                        given_rows(layer, seen[group.consumer, "output"]),
                        given_rows(layer, seen[point]),
                        median,
                    )
            advance(1)


def _kept(item: RecoveryContext, group: Group, layer: nn.Module, read: Tensor) -> Tensor:
    columns = group.columns[item.plan.kept[group.name]].flatten()
    return read.index_select(input_axis(layer), columns.to(read.device))
