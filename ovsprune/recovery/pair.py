"""One block of both towers, over the streams of both: what block-wise refits work on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovsprune.calibration.refit import Refit, held_out, row_weights
from ovsprune.calibration.streams import Stream, run_stem, walk
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.rows import given_rows, read_rows
from ovsprune.recovery.taps import Site, Tap, median_norms, sites

__all__ = ["Pair", "pairs"]


@torch.no_grad()
def pairs(item: RecoveryContext, description: str) -> Iterator[Pair]:
    """Every block from the first that differs, in order; the streams advance as blocks are taken.

    Two streams go through the towers side by side, the dense one and the slim one.

    Args:
        item: The recovery's context.
        description: Of the stage that the progress shows.
    """
    dense, slim = item.stages(item.dense), item.stages(item.slim)
    with item.progress.stage(description, len(dense.blocks) + 1) as advance:
        dense_stream = run_stem(dense, item.pictures, item.batch_size)
        slim_stream = dense_stream.copy()
        advance(1)
        drifted = False
        for name, block in dense.blocks.items():
            # A training between rounds changes blocks that nothing was cut from, too.
            drifted = (
                drifted
                or any(site.cut for site in sites(item, name))
                or _changed(block, slim.blocks[name])
            )
            if drifted:
                yield Pair(item, name, block, slim.blocks[name], dense_stream, slim_stream)
                _run(slim.blocks[name], slim_stream, item.batch_size)
            _run(block, dense_stream, item.batch_size)
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


@dataclass(frozen=True, eq=False)
class _Target:
    """A layer to correct, and where the towers are compared.

    Attributes:
        module: Dotted name of the layer.
        point: Tap at which the slim tower should be what the dense one is.
        layer: That layer in the slim tower.
        outputs: Which of the dense tower's outputs to compare with; None for all.
    """

    module: str
    point: Tap
    layer: nn.Module
    outputs: Tensor | None = None

    def wanted(self, seen: Tensor) -> Tensor:
        """Rows that are compared, of what passed the point in the dense tower."""
        rows = given_rows(self.layer, seen)
        return rows if self.outputs is None else rows[..., self.outputs.to(seen.device)]


class Pair:
    """One block of the dense and of the slim tower, and the streams before it.

    Args:
        item: The recovery's context.
        name: Dotted name of the block.
        dense: The block in the dense tower.
        slim: The block in the slim tower.
        dense_stream: Before the dense block.
        slim_stream: Before the slim block.
    """

    def __init__(
        self,
        item: RecoveryContext,
        name: str,
        dense: nn.Module,
        slim: nn.Module,
        dense_stream: Stream,
        slim_stream: Stream,
    ) -> None:
        self.item, self.name = item, name
        self.dense, self.slim = dense, slim
        self.dense_stream, self.slim_stream = dense_stream, slim_stream

    def inside(self, name: str) -> str:
        """The dotted name of a layer inside the block."""
        return name.removeprefix(self.name).removeprefix(".")

    def refit_producers(self, site: Site) -> None:
        """Refit what makes the units: from what it reads in the slim tower to the dense units."""
        find = self.item.slim.get_submodule
        self._regress(
            [
                _Target(name, (name, "output"), find(name), rows)
                for name, rows in site.producers.items()
            ]
        )

    def refit_consumer(self, site: Site) -> None:
        """Refit what reads the units.

        Its target is what takes the slim stream to where the dense stream is at that point:
        ``y* = y + (r_dense - r_slim)``, y being the slim consumer's present output and r the
        streams after it. So what earlier cuts have done is repaired too, and errors do not pile
        up. Without a residual (``stream`` is None) the target is the dense consumer's own output.
        """
        layer = self.item.slim.get_submodule(site.consumer)
        self._regress([_Target(site.consumer, site.target, layer)])

    def _regress(self, targets: Sequence[_Target]) -> None:
        """Correct layers of the slim block, all from one pass over both streams."""
        size, held = self.item.batch_size, held_out(len(self.dense_stream))
        dense_taps = [t.point for t in targets]
        slim_taps = [tap for t in targets for tap in (t.point, (t.module, "input"))]
        medians = median_norms(
            self.dense, self.dense_stream, size, self.name, [(t.point, t.wanted) for t in targets]
        )
        refits = [Refit(t.layer, held, self.item.ridge) for t in targets]
        for (part, wanted), (_, seen) in zip(
            walk(self.dense, self.dense_stream, size, dense_taps, self.name),
            walk(self.slim, self.slim_stream, size, slim_taps, self.name),
            strict=True,
        ):
            for target, refit, median in zip(targets, refits, medians, strict=True):
                goal = target.wanted(wanted[target.point])
                residual = goal - given_rows(target.layer, seen[target.point])
                read = read_rows(target.layer, seen[target.module, "input"])
                refit.update(part, read, residual, row_weights(goal, median))
        for refit in refits:
            refit.apply()
