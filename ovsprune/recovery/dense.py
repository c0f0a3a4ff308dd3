"""One walk through the dense tower: what the consumers of cut groups read and give there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ovsprune.calibration.activation_cache import run_stem, walk
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.layers import input_axis
from ovsprune.recovery.refit_targets import RefitTarget, median_norms, sites

__all__ = ["Seen", "consumers_of"]


@dataclass(frozen=True, eq=False)
class Seen:
    """One batch at one consumer of the dense tower.

    Attributes:
        block: Dotted name of the block that the consumer is in.
        site: The consumer.
        part: Pictures of the batch.
        kept: Of what the consumer reads, the channels of the kept units: what the slim one reads.
        output: What it gives where the slim one gives something, as rows [b, ..., m].
        target: The residual stream after it, or ``output``, as rows [b, ..., m].
        median: Of the squared norms of the rows of ``target``.
    """

    block: str
    site: RefitTarget
    part: slice
    kept: Tensor
    output: Tensor
    target: Tensor
    median: float


def consumers_of(ctx: RecoveryContext, description: str) -> Iterator[Seen]:
    """Every batch of calibration pictures at every consumer of cut groups, block after block.

    Args:
        ctx: The recovery's context; nothing is run where nothing was cut.
        description: Of the stage that the progress shows.
    """
    stages = ctx.stages(ctx.dense)
    cut = {
        name: [s for found in sites(ctx, name) for s in (*found.others, found) if s.cut]
        for name in stages.blocks
    }
    last = max((i for i, name in enumerate(cut) if cut[name]), default=-1)
    if last < 0:
        return
    with ctx.progress.stage(description, last + 2) as advance:
        stream = run_stem(stages, ctx.pictures, ctx.batch_size)
        advance(1)
        for name, block in list(stages.blocks.items())[: last + 1]:
            points = [site.target for site in cut[name]]
            layers = [ctx.dense.get_submodule(site.consumer) for site in cut[name]]
            rows = [
                partial(site.goal, layer) for site, layer in zip(cut[name], layers, strict=True)
            ]
            medians = median_norms(
                block, stream, ctx.batch_size, name, list(zip(points, rows, strict=True))
            )
            taps = [(site.consumer, side) for site in cut[name] for side in ("input", "output")]
            for part, seen in walk(
                block, stream, ctx.batch_size, [*taps, *points], name, advance=True
            ):
                for site, layer, median in zip(cut[name], layers, medians, strict=True):
                    read = seen[site.consumer, "input"]
                    yield Seen(
                        name,
                        site,
                        part,
                        read.index_select(input_axis(layer), site.columns.to(read.device)),
                        site.output(layer, seen[site.consumer, "output"]),
                        site.goal(layer, seen[site.target]),
                        median,
                    )
            advance(1)
