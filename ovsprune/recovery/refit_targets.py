"""What the recoveries without gradients share: what was cut where, and how long its rows are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import Stream, spread_over, walk
from ovsprune.calibration.refit import median_of, squared_norms
from ovsprune.core.protocols import RecoveryContext
from ovsprune.core.records import Group
from ovsprune.graph.cut import kept_rows
from ovsprune.graph.layers import is_channelwise
from ovsprune.graph.rows import output_rows

__all__ = ["HookPoint", "RefitTarget", "median_norm", "median_norms", "sites"]

HookPoint = tuple[str, str]
"""Dotted name of a layer, and its ``"input"`` or ``"output"``."""

_SAMPLED = 16
"""Pictures on which a median is taken."""


@dataclass(frozen=True, eq=False)
class RefitTarget:
    """A layer that reads units, and the layers that make what it reads.

    Where more than one layer reads the units, the site is the consumer's, and the others have sites
    of their own inside it.

    Attributes:
        consumer: Dotted name of the layer that reads.
        target: Where its effect is read: the residual stream after it, or its own output.
        columns: int64, its columns that are kept.
        producers: Dotted name of each layer that makes units, to its kept rows, int64. What makes a
            unit from that unit alone, a norm or a depthwise convolution, is not among them.
        cut: Whether anything is gone.
        axis: Where the channels lie at the target; None where they do in the consumer's output.
        others: Sites of the other layers that read the units, without producers.
        gates: Those of the producers that work on what ``others`` give.
        given: int64, its rows that are kept, or None for all: in other groups it may make units.
    """

    consumer: str
    target: HookPoint
    columns: Tensor
    producers: Mapping[str, Tensor]
    cut: bool
    axis: int | None = None
    others: tuple[RefitTarget, ...] = ()
    gates: frozenset[str] = frozenset()
    given: Tensor | None = None

    @property
    def makers(self) -> list[str]:
        """The producers that are no gates."""
        return [name for name in self.producers if name not in self.gates]

    def rows(self, layer: nn.Module, given: Tensor) -> Tensor:
        """What lies at the target, as rows [b, ..., m] in the order of the consumer's."""
        return output_rows(layer, given) if self.axis is None else given.movedim(self.axis, -1)

    @property
    def is_own(self) -> bool:
        """Whether the target is its own output, since nothing is added to it."""
        return self.target == (self.consumer, "output")

    def output(self, layer: nn.Module, given: Tensor) -> Tensor:
        """What the slim consumer could give of what the dense one gives, as rows [b, ..., m]."""
        return self._left(output_rows(layer, given))

    def goal(self, layer: nn.Module, read: Tensor) -> Tensor:
        """What was read at the target in the dense tower, of what the slim one has there too.

        As rows [b, ..., m].
        """
        return self.output(layer, read) if self.is_own else self._left(self.rows(layer, read))

    def _left(self, rows: Tensor) -> Tensor:
        return rows if self.given is None else rows[..., self.given.to(rows.device)]


def sites(ctx: RecoveryContext, block: str) -> list[RefitTarget]:
    """The consumers of ``block``, in the order of its groups."""
    groups = [g for g in ctx.groups if g.block == block]
    rows, find = kept_rows(ctx.dense, groups, ctx.plan), ctx.dense.get_submodule
    found = []
    for consumer in dict.fromkeys(g.consumer for g in groups):
        mine = [g for g in groups if g.consumer == consumer]
        makers = [s.module for g in mine for s in g.slices if s.axis == "out"]
        # what makes units, and is left to make any
        makers = [n for n in makers if len(rows[n, "out"]) and not is_channelwise(find(n))]
        cut = any(ctx.plan.width(g.name) < g.units for g in mine)
        others = dict.fromkeys(s.module for g in mine for s in g.readers if s.module != consumer)
        stream = mine[0].stream
        found.append(
            RefitTarget(
                consumer,
                _target_of(mine[0]),
                rows[consumer, "in"],
                {name: rows[name, "out"] for name in makers},
                cut,
                None if stream is None else stream.axis,
                tuple(RefitTarget(n, (n, "output"), rows[n, "in"], {}, cut) for n in others),
                frozenset(name for g in mine for name in g.gating_layers),
                rows.get((consumer, "out")),
            )
        )
    return found


def _target_of(group: Group) -> HookPoint:
    if group.stream is None:
        return group.consumer, "output"
    return group.stream.module, group.stream.side


def median_norm(rows: Stream) -> float:
    """Median of the squared norms of rows [pictures, ..., k], on at most 16 pictures."""
    return float(median_of(squared_norms(rows[spread_over(len(rows), _SAMPLED)])))


def median_norms(
    block: nn.Module,
    stream: Stream,
    batch_size: int,
    name: str,
    points: Sequence[tuple[HookPoint, Callable[[Tensor], Tensor]]],
) -> list[float]:
    """Medians of the rows' squared norms at some points of a block, on at most 16 pictures.

    Args:
        block: Of the dense tower.
        stream: Before it.
        batch_size: Pictures at a time.
        name: The block's dotted name.
        points: Taps, and the rows of the tensor there that are meant, [b, ..., k].
    """
    sample = Stream(stream[spread_over(len(stream), _SAMPLED)])
    norms: list[list[Tensor]] = [[] for _ in points]
    for _, seen in walk(block, sample, batch_size, [tap for tap, _ in points], name):
        for found, (tap, chosen) in zip(norms, points, strict=True):
            found.append(squared_norms(chosen(seen[tap])).flatten().cpu())
    return [float(median_of(torch.cat(found))) for found in norms]
