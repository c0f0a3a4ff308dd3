"""Inputs and outputs of the consumers of cut groups in the dense tower, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ovsprune.calibration.activation_cache import run_block, run_stem
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.layers import input_axis
from ovsprune.recovery.refit_targets import RefitTarget, find_refit_targets, median_norms

__all__ = ["ConsumerBatch", "consumer_batches"]


@dataclass(frozen=True, eq=False)
class ConsumerBatch:
    """One batch at one consumer of the dense tower.

    Attributes:
        block: Dotted name of the block that contains the consumer.
        target: Refit target of the consumer.
        part: Indices of the images in the batch.
        kept_input: Input of the dense consumer, restricted to the channels of kept units. This is
            the input of the slim consumer.
        output: Output of the dense consumer, restricted to the rows of the slim one, [b, ..., m].
        reference: Residual stream after the consumer, or ``output``, as rows [b, ..., m].
        median: Median of the squared norms of the rows of ``reference``.
    """

    block: str
    target: RefitTarget
    part: slice
    kept_input: Tensor
    output: Tensor
    reference: Tensor
    median: float


def consumer_batches(ctx: RecoveryContext, description: str) -> Iterator[ConsumerBatch]:
    """Yield every batch of calibration images at every consumer of cut groups, block by block.

    If nothing was cut, no forward pass is run.

    Args:
        ctx: Context of the recovery.
        description: Name of the stage in the progress display.
    """
    stages = ctx.stages(ctx.dense)
    # Other readers of the units come first: they are upstream of the consumer.
    cut = {
        name: [
            part
            for target in find_refit_targets(ctx, name)
            for part in (*target.other_consumers, target)
            if part.is_cut
        ]
        for name in stages.blocks
    }
    last = max((i for i, name in enumerate(cut) if cut[name]), default=-1)
    if last < 0:
        return
    with ctx.progress.stage(description, last + 2) as advance:
        cache = run_stem(stages, ctx.pictures, ctx.batch_size)
        advance(1)
        for name, block in list(stages.blocks.items())[: last + 1]:
            points = [target.hook_point for target in cut[name]]
            layers = [ctx.dense.get_submodule(target.consumer) for target in cut[name]]
            references = [
                partial(target.reference, layer)
                for target, layer in zip(cut[name], layers, strict=True)
            ]
            medians = median_norms(
                block, cache, ctx.batch_size, name, list(zip(points, references, strict=True))
            )
            sides = [(t.consumer, side) for t in cut[name] for side in ("input", "output")]
            for part, captured in run_block(
                block, cache, ctx.batch_size, [*sides, *points], name, advance=True
            ):
                for target, layer, median in zip(cut[name], layers, medians, strict=True):
                    read = captured[target.consumer, "input"]
                    yield ConsumerBatch(
                        block=name,
                        target=target,
                        part=part,
                        kept_input=read.index_select(
                            input_axis(layer), target.kept_columns.to(read.device)
                        ),
                        output=target.kept_output(layer, captured[target.consumer, "output"]),
                        reference=target.reference(layer, captured[target.hook_point]),
                        median=median,
                    )
            advance(1)
