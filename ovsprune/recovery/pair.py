"""One block of both towers, over the streams of both: what block-wise refits work on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import Capture, Stream, allocate, run_stem, walk
from ovsprune.calibration.refit import Refit, held_out, row_weights
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.rows import input_rows, output_rows
from ovsprune.recovery.refit_targets import RefitTarget, median_norm, median_norms, sites

__all__ = ["Pair", "pairs"]


@torch.no_grad()
def pairs(ctx: RecoveryContext, description: str) -> Iterator[Pair]:
    """Every block from the first that differs, in order; the streams advance as blocks are taken.

    Two streams go through the towers side by side, the dense one and the slim one.

    Args:
        ctx: The recovery's context.
        description: Of the stage that the progress shows.
    """
    dense, slim = ctx.stages(ctx.dense), ctx.stages(ctx.slim)
    with ctx.progress.stage(description, len(dense.blocks) + 1) as advance:
        dense_stream = run_stem(dense, ctx.pictures, ctx.batch_size)
        drifted = False
        slim_stream = dense_stream.copy()
        advance(1)
        for name, block in dense.blocks.items():
            # A training between rounds changes blocks that nothing was cut from, too.
            drifted = (
                drifted
                or any(site.cut for site in sites(ctx, name))
                or _changed(block, slim.blocks[name])
            )
            if drifted:
                yield Pair(ctx, name, block, slim.blocks[name], dense_stream, slim_stream)
                _run(slim.blocks[name], slim_stream, ctx.batch_size)
            _run(block, dense_stream, ctx.batch_size)
            if not drifted:
                slim_stream.copy_(dense_stream)
            advance(1)


def _changed(dense: nn.Module, slim: nn.Module) -> bool:
    """Whether two blocks of the same shapes have different tensors."""
    other = slim.state_dict()
    return any(not torch.equal(t, other[name]) for name, t in dense.state_dict().items())


def _run(block: nn.Module, stream: Stream, batch_size: int) -> None:
    for _ in walk(block, stream, batch_size, advance=True):
        pass


class Pair:
    """One block of the dense and of the slim tower, and the streams before it.

    Args:
        ctx: The recovery's context.
        name: Dotted name of the block.
        dense: The block in the dense tower.
        slim: The block in the slim tower.
        dense_stream: Before the dense block.
        slim_stream: Before the slim block.
    """

    def __init__(
        self,
        ctx: RecoveryContext,
        name: str,
        dense: nn.Module,
        slim: nn.Module,
        dense_stream: Stream,
        slim_stream: Stream,
    ) -> None:
        self.item, self.name, self.size = ctx, name, ctx.batch_size
        self.dense, self.slim = dense, slim
        self.dense_stream, self.slim_stream = dense_stream, slim_stream
        self.held = held_out(len(dense_stream))
        self._goal: tuple[str, Stream, float] | None = None
        self._fitted: set[str] = set()

    def inside(self, name: str) -> str:
        """The dotted name of a layer inside the block."""
        return name.removeprefix(self.name).removeprefix(".")

    def refit_producers(self, site: RefitTarget) -> None:
        """Refit what makes the units: from what it reads in the slim tower to the dense units.

        A gate on the units comes last, behind the layers that read them for it, which are refitted
        to what they gave. What reads units of another group, too, was fitted to just that as their
        consumer.
        """
        self._refit_makers(site, [name for name in site.makers if name not in self._fitted])
        for other in site.others:
            self.refit_consumer(other)
        self._refit_makers(site, [name for name in site.producers if name in site.gates])

    def _refit_makers(self, site: RefitTarget, names: Sequence[str]) -> None:
        layers = {name: self.item.slim.get_submodule(name) for name in names}
        if not layers:
            return

        def units(name: str, given: Tensor) -> Tensor:
            return output_rows(layers[name], given)[..., site.producers[name].to(given.device)]

        outputs = {name: (name, "output") for name in layers}
        medians = median_norms(
            self.dense,
            self.dense_stream,
            self.size,
            self.name,
            [(tap, partial(units, name)) for name, tap in outputs.items()],
        )
        refits = {name: Refit(layer, self.held, self.item.ridge) for name, layer in layers.items()}
        both = [(name, side) for name in layers for side in ("input", "output")]
        for (part, wanted), (_, seen) in zip(
            walk(self.dense, self.dense_stream, self.size, outputs.values(), self.name),
            walk(self.slim, self.slim_stream, self.size, both, self.name),
            strict=True,
        ):
            for (name, layer), median in zip(layers.items(), medians, strict=True):
                goal = units(name, wanted[outputs[name]])
                residual = goal - output_rows(layer, seen[outputs[name]])
                read = input_rows(layer, seen[name, "input"])
                refits[name].update(part, read, residual, row_weights(goal, median))
        for refit in refits.values():
            refit.apply()

    def refit_consumer(self, site: RefitTarget) -> None:
        """Refit what reads the units.

        Its target is what takes the slim stream to where the dense stream is at that point:
        ``y* = y + (r_dense - r_slim)``, y being the slim consumer's present output and r the
        streams after it. So what earlier cuts have done is repaired too, and errors do not pile
        up. Without a residual (``stream`` is None) the target is the dense consumer's own output,
        of which the slim one may have lost a part as units of another group.
        """
        layer = self.item.slim.get_submodule(site.consumer)
        refit = Refit(layer, self.held, self.item.ridge)
        for part, weight, residual, seen in self.compared(site, [site.consumer]):
            refit.update(part, input_rows(layer, seen[site.consumer, "input"]), residual, weight)
        refit.apply()
        if site.is_own:
            self._fitted.add(site.consumer)

    def compared(
        self, site: RefitTarget, layers: Sequence[str] = (), which: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Capture]]:
        """Batches of pictures, and how far the slim tower is from the dense one behind a consumer.

        Args:
            site: The consumer.
            layers: Whose inputs are wanted.
            which: int64, the pictures; all by default.

        Yields:
            Their slice of ``which``; weights [b, ...] and residuals [b, ..., m] of the rows behind
            the consumer; and what ``layers`` read.
        """
        layer = self.item.slim.get_submodule(site.consumer)
        goals, median = self._goals(site, layer)
        stream = self.slim_stream
        if which is not None:
            goals, stream = goals.only(which), stream.only(which)
        taps = [site.target, *((name, "input") for name in layers)]
        for part, seen in walk(self.slim, stream, self.size, taps, self.name):
            now = site.rows(layer, seen[site.target])
            goal = goals[part].to(now)
            yield part, row_weights(goal, median), goal - now, seen

    def _goals(self, site: RefitTarget, layer: nn.Module) -> tuple[Stream, float]:
        """Rows behind a consumer in the dense tower, and the median of their squared norms.

        They are gathered once for a consumer, however often it is refitted.
        """
        if self._goal is None or self._goal[0] != site.consumer:
            found: Stream | None = None
            for part, seen in walk(
                self.dense, self.dense_stream, self.size, [site.target], self.name
            ):
                rows = site.goal(layer, seen[site.target]).float().cpu()
                if found is None:
                    found = Stream(allocate((len(self.held), *rows.shape[1:])))
                found[part] = rows
            assert found is not None
            self._goal = site.consumer, found, median_norm(found)
        return self._goal[1:]
