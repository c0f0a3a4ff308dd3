"""Corresponding blocks of the dense and the slim tower, and the refits of their layers.

Both towers run in parallel, block by block, each with an activation cache of its own. The slim
cache contains the error of all blocks before (llm-compressor: "propagate error"), so each refit
also compensates for the blocks before it.

Letters: inputs x [b, ..., n] of a layer, residuals e [b, ..., m], row weights w [b, ...].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import (
    ActivationCache,
    Capture,
    concatenate,
    run_block,
    run_stem,
)
from ovsprune.calibration.refit import Refit, held_out_mask, row_weights
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.rows import input_rows, output_rows
from ovsprune.recovery.refit_targets import (
    RefitTarget,
    find_refit_targets,
    median_norm,
    median_norms,
)

__all__ = ["BlockPair", "block_pairs"]


@torch.no_grad()
def block_pairs(ctx: RecoveryContext, description: str) -> Iterator[BlockPair]:
    """Yield the pairs of blocks in order, from the first block that differs.

    The caller may change the slim block of each pair; the slim cache then advances with the
    changed block. ``description`` names the stage in the progress display.
    """
    dense, slim = ctx.stages(ctx.dense), ctx.stages(ctx.slim)
    # One step of progress for the stem, and one per block.
    with ctx.progress.stage(description, len(dense.blocks) + 1) as advance:
        dense_cache = run_stem(dense, ctx.pictures, ctx.batch_size)
        differs = False
        # Nothing is cut before the first block, so both towers have the same stem.
        slim_cache = dense_cache.copy()  # [images, ...]
        advance(1)
        for name, block in dense.blocks.items():
            # Compare tensors too: a training between rounds also changes blocks without a cut.
            differs = (
                differs
                or any(target.is_cut for target in find_refit_targets(ctx, name))
                or _has_other_tensors(block, slim.blocks[name])
            )
            if differs:
                yield BlockPair(ctx, name, block, slim.blocks[name], dense_cache, slim_cache)
                _advance(slim.blocks[name], slim_cache, ctx.batch_size)
            _advance(block, dense_cache, ctx.batch_size)
            if not differs:
                # Equal blocks have equal outputs; copying saves a forward pass.
                slim_cache.copy_(dense_cache)
            advance(1)


def _has_other_tensors(dense: nn.Module, slim: nn.Module) -> bool:
    """Return True if two blocks of the same shapes have different tensors."""
    other = slim.state_dict()
    return any(not torch.equal(t, other[name]) for name, t in dense.state_dict().items())


def _advance(block: nn.Module, cache: ActivationCache, batch_size: int) -> None:
    for _ in run_block(block, cache, batch_size, advance=True):
        pass


class BlockPair:
    """Block of the dense and of the slim tower, with the inputs of both.

    Args:
        ctx: Context of the recovery.
        name: Dotted name of the block.
        dense: Block of the dense tower.
        slim: Block of the slim tower.
        dense_cache: Input of the dense block.
        slim_cache: Input of the slim block.
    """

    def __init__(
        self,
        ctx: RecoveryContext,
        name: str,
        dense: nn.Module,
        slim: nn.Module,
        dense_cache: ActivationCache,
        slim_cache: ActivationCache,
    ) -> None:
        self.ctx, self.name, self.batch_size = ctx, name, ctx.batch_size
        self.dense, self.slim = dense, slim
        self.dense_cache, self.slim_cache = dense_cache, slim_cache
        self.held_out = held_out_mask(len(dense_cache))  # bool [images]
        # References of one consumer at a time: (consumer, rows [images, ..., m], median norm).
        self._references_of: tuple[str, ActivationCache, float] | None = None
        self._fitted_to_own_output: set[str] = set()

    def local_name(self, name: str) -> str:
        """Return the dotted name of a layer relative to the block."""
        return name.removeprefix(self.name).removeprefix(".")

    def refit_producers(self, target: RefitTarget) -> None:
        """Refit the producers from their slim inputs to the kept units of the dense tower.

        The order follows the data flow: producers, other consumers of the units, gating layers that
        read the output of these consumers. A producer that was refitted as the consumer of another
        group, with its own output as the reference, is skipped: the fit would be the same.
        """
        self._refit_layers(
            target,
            [name for name in target.direct_producers if name not in self._fitted_to_own_output],
        )
        for other in target.other_consumers:
            self.refit_consumer(other)
        self._refit_layers(
            target, [name for name in target.producers if name in target.gating_layers]
        )

    def _refit_layers(self, target: RefitTarget, names: Sequence[str]) -> None:
        """Refit producers in one pass over both blocks."""
        # Layout and width are those of the slim layers, in both towers.
        layers = {name: self.ctx.slim.get_submodule(name) for name in names}
        if not layers:
            return

        def kept_units(name: str, output: Tensor) -> Tensor:
            # The dense output [b, ..., units], restricted to the units that the slim layer has.
            rows = output_rows(layers[name], output)
            return rows[..., target.producers[name].to(output.device)]  # [b, ..., m]

        outputs = {name: (name, "output") for name in layers}
        medians = median_norms(
            self.dense,
            self.dense_cache,
            self.batch_size,
            self.name,
            [(hook_point, partial(kept_units, name)) for name, hook_point in outputs.items()],
        )
        refits = {
            name: Refit(layer, self.held_out, self.ctx.ridge) for name, layer in layers.items()
        }
        both = [(name, side) for name in layers for side in ("input", "output")]
        dense = run_block(
            self.dense, self.dense_cache, self.batch_size, outputs.values(), self.name
        )
        slim = run_block(self.slim, self.slim_cache, self.batch_size, both, self.name)
        for (part, dense_outputs), (_, captured) in zip(dense, slim, strict=True):
            for (name, layer), median in zip(layers.items(), medians, strict=True):
                reference = kept_units(name, dense_outputs[outputs[name]])  # [b, ..., m]
                e = reference - output_rows(layer, captured[outputs[name]])  # [b, ..., m]
                x = input_rows(layer, captured[name, "input"])  # [b, ..., n]
                refits[name].update(part, x, e, row_weights(reference, median))
        # All layers are fitted before any is changed: each residual was measured before.
        for refit in refits.values():
            refit.apply()

    def refit_consumer(self, target: RefitTarget) -> None:
        """Refit the layer that reads the units.

        The reference output is ``y* = y + (r_dense - r_slim)``, where y is the present output of
        the slim consumer and r is the residual stream after it. Therefore the refit also corrects
        errors of earlier cuts, which would otherwise accumulate. Without a residual connection
        (``Group.stream`` is None), the reference is the output of the dense consumer, restricted to
        the rows that the slim consumer has.
        """
        layer = self.ctx.slim.get_submodule(target.consumer)
        refit = Refit(layer, self.held_out, self.ctx.ridge)
        for part, w, e, captured in self.residuals(target, [target.consumer]):
            x = input_rows(layer, captured[target.consumer, "input"])  # [b, ..., n]
            refit.update(part, x, e, w)
        refit.apply()
        # refit_producers() of a later group can skip the layer.
        if target.uses_own_output:
            self._fitted_to_own_output.add(target.consumer)

    def residuals(
        self, target: RefitTarget, layers: Sequence[str] = (), images: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Capture]]:
        """Yield the residuals between both towers at the hook point of a consumer, in batches.

        Args:
            target: Refit target of the consumer.
            layers: Layers whose inputs to record as well.
            images: int64, indices of the images; all images by default.

        Yields:
            Slice of ``images``; row weights w [b, ...]; residuals e [b, ..., m], dense minus slim;
            and the recorded inputs of ``layers``.
        """
        layer = self.ctx.slim.get_submodule(target.consumer)
        references, median = self._references(target, layer)
        cache = self.slim_cache
        # Copies, because cached tensors are read in contiguous batches.
        if images is not None:
            references, cache = references.select(images), cache.select(images)
        hook_points = [target.hook_point, *((name, "input") for name in layers)]
        for part, captured in run_block(self.slim, cache, self.batch_size, hook_points, self.name):
            current = target.hook_rows(layer, captured[target.hook_point])  # [b, ..., m]
            reference = references[part].to(current)  # [b, ..., m]
            yield part, row_weights(reference, median), reference - current, captured

    def _references(self, target: RefitTarget, layer: nn.Module) -> tuple[ActivationCache, float]:
        """Return the dense rows at the hook point and the median of their squared norms."""
        # Computed once per consumer, even if it is refitted several times.
        if self._references_of is None or self._references_of[0] != target.consumer:
            batches = run_block(
                self.dense, self.dense_cache, self.batch_size, [target.hook_point], self.name
            )
            rows = (target.reference(layer, captured[target.hook_point]) for _, captured in batches)
            references = ActivationCache(concatenate(rows, len(self.held_out)))
            self._references_of = target.consumer, references, median_norm(references)
        return self._references_of[1:]
