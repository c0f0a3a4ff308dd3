"""Layers to refit in a block, and the points at which their effect is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import ActivationCache, evenly_spaced, run_block
from ovsprune.calibration.refit import positive_median, squared_norms
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.cut import kept_rows
from ovsprune.graph.layers import is_channelwise
from ovsprune.graph.rows import output_rows

__all__ = ["HookPoint", "RefitTarget", "find_refit_targets", "median_norm", "median_norms"]

HookPoint = tuple[str, str]
"""Dotted name of a layer, and ``"input"`` or ``"output"``."""

_SAMPLED = 16
"""Maximum number of images from which a median is computed."""


@dataclass(frozen=True, eq=False)
class RefitTarget:
    """Consumer that reads units, and the producers that compute them.

    If several layers read the units, one of them is the consumer, and the others have refit targets
    of their own in ``other_consumers``.

    Attributes:
        consumer: Dotted name of the layer that reads the units.
        hook_point: Point at which the effect of the consumer is measured: the residual stream after
            it, or its own output.
        kept_columns: int64, the kept columns of the consumer (its input channels).
        producers: Dotted name of each producer to its kept rows (output channels), int64. Layers
            that act on each unit separately (norms, depthwise convolutions) are not included.
        is_cut: True if the plan removes units.
        stream_axis: Channel axis at the hook point; None if it is that of the consumer's output.
        other_consumers: Refit targets of the other layers that read the units, without producers.
        gating_layers: Producers that compute a factor of each unit from the output of
            ``other_consumers`` (squeeze-and-excitation).
        kept_rows: int64, the kept rows of the consumer, or None for all. Rows are removed if the
            consumer is a producer of another group.
    """

    consumer: str
    hook_point: HookPoint
    kept_columns: Tensor
    producers: Mapping[str, Tensor]
    is_cut: bool
    stream_axis: int | None = None
    other_consumers: tuple[RefitTarget, ...] = ()
    gating_layers: frozenset[str] = frozenset()
    kept_rows: Tensor | None = None

    @property
    def direct_producers(self) -> list[str]:
        """Names of the producers that are not gating layers."""
        return [name for name in self.producers if name not in self.gating_layers]

    @property
    def uses_own_output(self) -> bool:
        """True if the hook point is the consumer's own output, because no residual is added."""
        return self.hook_point == (self.consumer, "output")

    def hook_rows(self, layer: nn.Module, captured: Tensor) -> Tensor:
        """Return the tensor at the hook point as rows [b, ..., m], in the order of the output."""
        if self.stream_axis is None:
            return output_rows(layer, captured)
        return captured.movedim(self.stream_axis, -1)

    def kept_output(self, layer: nn.Module, output: Tensor) -> Tensor:
        """Return the kept channels of the dense consumer's output as rows [b, ..., m]."""
        return self._keep_rows(output_rows(layer, output))

    def reference(self, layer: nn.Module, captured: Tensor) -> Tensor:
        """Return the reference of the fit as rows [b, ..., m]: channels that the slim tower has.

        Args:
            layer: Consumer in the dense tower.
            captured: Tensor at the hook point in the dense tower.
        """
        if self.uses_own_output:
            return self.kept_output(layer, captured)
        return self._keep_rows(self.hook_rows(layer, captured))

    def _keep_rows(self, rows: Tensor) -> Tensor:
        return rows if self.kept_rows is None else rows[..., self.kept_rows.to(rows.device)]


def find_refit_targets(ctx: RecoveryContext, block: str) -> list[RefitTarget]:
    """Return the refit targets of the block with this dotted name, in the order of its groups."""
    groups = [g for g in ctx.groups if g.block == block]
    rows, layer_of = kept_rows(ctx.dense, groups, ctx.plan), ctx.dense.get_submodule
    targets = []
    for consumer in dict.fromkeys(g.consumer for g in groups):
        read = [g for g in groups if g.consumer == consumer]  # groups that the consumer reads
        producers = [s.module for g in read for s in g.slices if s.axis == "out"]
        # Skip producers without remaining rows, and layers that only scale each unit.
        producers = [
            n for n in producers if len(rows[n, "out"]) and not is_channelwise(layer_of(n))
        ]
        is_cut = any(ctx.plan.width(g.name) < g.units for g in read)
        others = dict.fromkeys(s.module for g in read for s in g.readers if s.module != consumer)
        stream = read[0].stream
        targets.append(
            RefitTarget(
                consumer=consumer,
                hook_point=(stream.module, stream.side) if stream else (consumer, "output"),
                kept_columns=rows[consumer, "in"],
                producers={name: rows[name, "out"] for name in producers},
                is_cut=is_cut,
                stream_axis=None if stream is None else stream.axis,
                other_consumers=tuple(
                    RefitTarget(
                        consumer=name,
                        hook_point=(name, "output"),
                        kept_columns=rows[name, "in"],
                        producers={},
                        is_cut=is_cut,
                    )
                    for name in others
                ),
                gating_layers=frozenset(name for g in read for name in g.gating_layers),
                kept_rows=rows.get((consumer, "out")),
            )
        )
    return targets


def median_norm(rows: ActivationCache) -> float:
    """Return the median squared norm of rows [images, ..., k], from at most 16 images."""
    return float(positive_median(squared_norms(rows[evenly_spaced(len(rows), _SAMPLED)])))


def median_norms(
    block: nn.Module,
    cache: ActivationCache,
    batch_size: int,
    name: str,
    points: Sequence[tuple[HookPoint, Callable[[Tensor], Tensor]]],
) -> list[float]:
    """Return the median squared norms of rows at points of a block, from at most 16 images.

    Args:
        block: Block of the dense tower.
        cache: Input of the block.
        batch_size: Images per batch.
        name: Dotted name of the block.
        points: Hook points, each with a function that converts the tensor there to rows
            [b, ..., k].
    """
    sample = ActivationCache(cache[evenly_spaced(len(cache), _SAMPLED)])
    norms: list[list[Tensor]] = [[] for _ in points]
    hook_points = [hook_point for hook_point, _ in points]
    for _, captured in run_block(block, sample, batch_size, hook_points, name):
        for parts, (hook_point, rows_of) in zip(norms, points, strict=True):
            parts.append(squared_norms(rows_of(captured[hook_point])).flatten().cpu())
    return [float(positive_median(torch.cat(parts))) for parts in norms]
