"""Closed form: every consumer re-fitted by ridge regression, block after block, no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovsprune.calibration.moments import CrossMoments
from ovsprune.calibration.ridge import correction
from ovsprune.calibration.streams import capture, run_stem
from ovsprune.core.protocols import RecoveryContext
from ovsprune.core.records import Group, StreamPoint
from ovsprune.graph.layers import bias_of, weight_of
from ovsprune.recovery import RECOVERIES

__all__ = ["ClosedForm"]


@RECOVERIES.register("closed-form")
class ClosedForm:
    """Ridge refit from the slim model's own activations to the dense residual stream."""

    needs_pictures = True

    @torch.no_grad()
    def recover(self, item: RecoveryContext) -> None:
        """Refit consumers in the order of the blocks, groups of a block in their own order.

        Two streams go through the towers side by side, the dense one and the slim one. First the
        layers that make a group's units are refitted, from what they read in the slim tower to
        what the kept units are in the dense tower; then the layer that reads the units. Its
        target is what takes the slim stream to where the dense stream is at that point:
        ``y* = y + (r_dense - r_slim)``, y being the slim consumer's present output and r the
        streams after it. So what earlier cuts have done is repaired too, and errors do not pile
        up. Without a residual (``stream`` is None) the target is the dense consumer's own output.
        The residual ``y* - y`` is regressed on the slim activations with the present weight as the
        prior (:func:`ovsprune.calibration.ridge.correction`); if nothing was cut it is zero, and
        so is the correction.
        """
        dense, slim = item.stages(item.dense), item.stages(item.slim)
        with item.progress.stage("closed-form refit", len(dense.blocks) + 1) as advance:
            dense_stream = run_stem(dense, item.pictures, item.batch_size)
            slim_stream = dense_stream.clone()
            advance(1)
            drifted = False
            for name, block in dense.blocks.items():
                groups = [g for g in item.groups if g.block == name]
                cut_here = any(item.plan.width(g.name) < g.units for g in groups)
                drifted |= cut_here
                if drifted:
                    walk = _Block(item, name, block, slim.blocks[name], dense_stream, slim_stream)
                    for group in groups:
                        walk.refit(group)
                    walk.finish()
                else:
                    _run(block, dense_stream, item.batch_size)
                    slim_stream.copy_(dense_stream)
                advance(1)


@dataclass(frozen=True, eq=False)
class _Target:
    """A layer to correct, and where the towers are compared.

    Attributes:
        module: Dotted name of the layer.
        point: Tap at which the slim tower should be what the dense one is.
        rows: Which of the dense tower's outputs to compare with; None for all.
    """

    module: str
    point: tuple[str, str]
    rows: Tensor | None = None


class _Block:
    """One block of both towers over both streams."""

    def __init__(
        self,
        item: RecoveryContext,
        name: str,
        dense: nn.Module,
        slim: nn.Module,
        dense_stream: Tensor,
        slim_stream: Tensor,
    ) -> None:
        self.item, self.name = item, name
        self.dense, self.slim = dense, slim
        self.dense_stream, self.slim_stream = dense_stream, slim_stream
        self.device = next(slim.parameters()).device

    def refit(self, group: Group) -> None:
        """Refit what makes the units, then what reads them."""
        kept = self.item.plan.kept[group.name]
        producers = [s for s in group.slices if s.axis == "out" and s.module not in group.norms]
        self._regress(
            [_Target(s.module, (s.module, "output"), s.rows[kept].flatten()) for s in producers]
        )
        point = group.stream or StreamPoint(group.consumer, "output")
        self._regress([_Target(group.consumer, (point.module, point.side))])

    def _regress(self, targets: Sequence[_Target]) -> None:
        """Correct layers of the slim block, all from one pass over both streams."""
        sums = [self._sums(target) for target in targets]
        with (
            capture(self.dense, [t.point for t in targets], self.name) as dense_seen,
            capture(
                self.slim,
                [tap for t in targets for tap in (t.point, (t.module, "input"))],
                self.name,
            ) as slim_seen,
        ):
            for start in range(0, len(self.dense_stream), self.item.batch_size):
                part = slice(start, start + self.item.batch_size)
                self.dense(self.dense_stream[part].to(self.device))
                self.slim(self.slim_stream[part].to(self.device))
                for target, found in zip(targets, sums, strict=True):
                    wanted = dense_seen[target.point]
                    if target.rows is not None:
                        wanted = wanted[..., target.rows.to(self.device)]
                    residual = wanted - slim_seen[target.point]
                    found.update(slim_seen[target.module, "input"], residual)
        for target, found in zip(targets, sums, strict=True):
            _correct(self.item.slim.get_submodule(target.module), found, self.item.ridge)

    def _sums(self, target: _Target) -> CrossMoments:
        outputs, inputs = weight_of(self.item.slim.get_submodule(target.module)).flatten(1).shape
        return CrossMoments(inputs, outputs)

    def finish(self) -> None:
        _run(self.dense, self.dense_stream, self.item.batch_size)
        _run(self.slim, self.slim_stream, self.item.batch_size)


def _run(block: nn.Module, stream: Tensor, batch_size: int) -> None:
    device = next(block.parameters()).device
    for start in range(0, len(stream), batch_size):
        part = slice(start, start + batch_size)
        stream[part] = block(stream[part].to(device)).float().cpu()


def _correct(layer: nn.Module, sums: CrossMoments, ridge: float) -> None:
    """Add the correction to weight and bias, in place."""
    moments, mean_e, cross = sums.result()
    change = correction(moments, cross, ridge)
    weight, bias = weight_of(layer), bias_of(layer)
    weight.copy_((weight.double().cpu().flatten(1) + change).view_as(weight).to(weight))
    if bias is not None:
        bias.copy_((bias.double().cpu() + mean_e - change @ moments.mean).to(bias))
