"""Inputs and outputs of the consumers of cut groups in the dense tower, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ovsprune.calibration.activation_cache import run_block, run_stem
from ovsprune.calibration.refit import row_weights
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.layers import input_axis
from ovsprune.graph.rows import output_rows
from ovsprune.recovery.refit_targets import find_refit_targets, median_norms

__all__ = ["ConsumerBatch", "consumer_batches"]


@dataclass(frozen=True, eq=False)
class ConsumerBatch:
    """Batch at one consumer of the dense tower.

    Attributes:
        block: Dotted name of the block that contains the consumer.
        consumer: Dotted name of the consumer.
        part: Indices of the images in the batch.
        kept_input: Input of the dense consumer, restricted to the channels of kept units. This is
            the input of the slim consumer.
        residual: Output of the dense consumer, restricted to the rows of the slim one, minus the
            output of the slim consumer on ``kept_input``, [b, ..., m].
        weight: Row weights [b, ...], from the dense residual stream after the consumer.
    """

    block: str
    consumer: str
    part: slice
    kept_input: Tensor
    residual: Tensor
    weight: Tensor


def consumer_batches(ctx: RecoveryContext, description: str) -> Iterator[ConsumerBatch]:
    """Yield every batch of calibration images at every consumer of cut groups, block by block.

    If nothing was cut, no forward pass is run. ``description`` names the stage in the progress
    display.
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
            layers = [ctx.dense.get_submodule(t.consumer) for t in cut[name]]
            references = [
                (t.hook_point, partial(t.reference, layer))
                for t, layer in zip(cut[name], layers, strict=True)
            ]
            medians = median_norms(block, cache, ctx.batch_size, name, references)
            points = [(t.consumer, side) for t in cut[name] for side in ("input", "output")]
            points += [t.hook_point for t in cut[name]]
            for part, captured in run_block(
                block, cache, ctx.batch_size, points, name, advance=True
            ):
                for target, layer, median in zip(cut[name], layers, medians, strict=True):
                    slim = ctx.slim.get_submodule(target.consumer)
                    read = captured[target.consumer, "input"]
                    columns = target.kept_columns.to(read.device)
                    kept_input = read.index_select(input_axis(layer), columns)
                    # y_dense - y_slim, both from the kept dense activations: [b, ..., m]
                    output = target.kept_output(layer, captured[target.consumer, "output"])
                    residual = output - output_rows(slim, slim(kept_input))
                    reference = target.reference(layer, captured[target.hook_point])
                    yield ConsumerBatch(
                        block=name,
                        consumer=target.consumer,
                        part=part,
                        kept_input=kept_input,
                        residual=residual,
                        weight=row_weights(reference, median),
                    )
            advance(1)
