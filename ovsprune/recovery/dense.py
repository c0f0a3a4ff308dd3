"""One walk through the dense tower: what the consumers of cut groups read and give there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ovsprune.calibration.streams import run_stem, walk
from ovsprune.core.protocols import RecoveryContext
from ovsprune.core.records import Group
from ovsprune.recovery.taps import cut_groups, median_norms, target_of

__all__ = ["Seen", "consumers_of"]


@dataclass(frozen=True, eq=False)
class Seen:
    """One batch at one consumer of the dense tower.

    Attributes:
        group: The cut group.
        part: Pictures of the batch.
        kept: Kept columns of what the consumer reads, [b, ..., kept * width].
        output: What it gives, [b, ..., m].
        target: The residual stream after it, or its output, [b, ..., m].
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
            medians = median_norms(
                block, stream, item.batch_size, name, [(p, lambda rows: rows) for p in points]
            )
            taps = [(g.consumer, side) for g in groups for side in ("input", "output")]
            for part, seen in walk(
                block, stream, item.batch_size, [*taps, *points], name, advance=True
            ):
                for group, point, median in zip(groups, points, medians, strict=True):
                    columns = group.columns[item.plan.kept[group.name]].flatten()
                    read = seen[group.consumer, "input"]
                    yield Seen(
                        group,
                        part,
                        read[..., columns.to(read.device)],
                        seen[group.consumer, "output"],
                        seen[point],
                        median,
                    )
            advance(1)
