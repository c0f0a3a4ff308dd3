"""Frozen records that pass between the steps of a pruning job.

``backbone.load -> graph.groups -> importance.scores -> allocation.plan -> cut -> recovery``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "Axis",
    "Costs",
    "Curves",
    "DenseModel",
    "Group",
    "Plan",
    "Preprocess",
    "Scores",
    "Slice",
    "StreamPoint",
]

Axis = Literal["out", "in"]
"""``"out"``: rows of a weight and entries of a bias; ``"in"``: columns."""


@dataclass(frozen=True)
class Costs:
    """What one forward pass over one picture costs.

    Attributes:
        macs: Multiply-accumulates (FLOPs / 2 of torch's FlopCounterMode, fast path off).
        params: Number of parameters.
    """

    macs: int
    params: int

    def of(self, budget: str) -> int:
        """What a budget counts: ``"macs"`` or ``"params"``."""
        return {"macs": self.macs, "params": self.params}[budget]


@dataclass(frozen=True)
class Preprocess:
    """How pictures become the tower's input.

    Attributes:
        size: Input height and width in pixels.
        mean: Per-channel mean in [0, 1] that is subtracted.
        std: Per-channel standard deviation that is divided by.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize_mode: ``"shortest"`` (resize the shorter side, centre crop), ``"squash"``, or
            ``"longest"``, as in open_clip.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"


@dataclass(frozen=True, eq=False)
class DenseModel:
    """Description of a dense model, from which its family builds it again.

    Attributes:
        name: Name of the model.
        architecture: JSON description from which the library builds it.
        preprocess: Conversion of images to its input.
        pretrained: Tag or file name of its weights, or None.
        trained: False when the weights are random.
        text: State of everything but the image tower, by canonical name; empty when there is none.
    """

    name: str
    architecture: Mapping[str, Any]
    preprocess: Preprocess
    pretrained: str | None = None
    trained: bool = False
    text: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Slice:
    """Part of one layer that belongs to a group.

    Attributes:
        module: Dotted name of the layer in the (rewritten) tower.
        axis: ``"out"``: rows of the weight and entries of the bias; ``"in"``: columns.
        rows: int64 [units, width]: the indices on that axis that make up each unit.
    """

    module: str
    axis: Axis
    rows: Tensor


@dataclass(frozen=True)
class StreamPoint:
    """Where the residual stream can be read just after a consumer's output was added to it.

    Attributes:
        module: Dotted name of a layer of the tower.
        side: Its ``"input"`` or its ``"output"`` is the stream.
        axis: Where its channels lie, if not where they lie in the consumer's output: a stream
            [B, C, h, w] behind a matrix that maps [B, h, w, n] to [B, h, w, C] has them on axis 1.
    """

    module: str
    side: Literal["input", "output"]
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Slices that can only go together, in units.

    Attributes:
        name: Unique name, the dotted path of what is cut (``"transformer.resblocks.3.attn"``).
        kind: Unit kind: ``"heads"``, ``"mlp"`` or ``"channels"``.
        units: How many units there are.
        slices: Every slice of every layer that goes with a unit.
        consumer: Dotted name of the projection that reads the units (it has an ``"in"`` slice).
            Its input is where the units' activation is tapped.
        block: Dotted name of the block that holds the group; blocks run one after another.
        stream: Where the residual stream is read after the consumer, or None without a residual.
        norms: Norms between the units and the consumer.
        macs: MACs that one unit costs at the native resolution.
        params: Parameters that one unit costs.
        min_units: Fewest units that may stay; 0 where all of them may go, and of what they did the
            consumer's bias is left.
        shared: Name of another group to what one unit of each costs together, where a layer reads
            the units of one and makes those of the other: their costs are then a product, and a
            unit of either is counted with all units of the other. Named in one of the two.
        gating_layers: Dotted names of layers that make a factor of each unit from what a reader
            other than the consumer gives: squeeze-and-excitation's second layer.
        cut_before: Whether the tower lost some of the units in an earlier prune: how many there are
            is then no width that its makers chose.
    """

    name: str
    kind: str
    units: int
    slices: tuple[Slice, ...]
    consumer: str
    block: str
    stream: StreamPoint | None = None
    norms: tuple[str, ...] = ()
    macs: float = 0.0
    params: float = 0.0
    min_units: int = 1
    shared: Mapping[str, Costs] = field(default_factory=dict)
    gating_layers: tuple[str, ...] = ()
    cut_before: bool = False

    @property
    def readers(self) -> tuple[Slice, ...]:
        """The slices of every layer that reads the units: a masked unit is zero for all of them.

        Only the consumer's units are ranked and its weight refitted for a width; what else reads
        them, as squeeze-and-excitation does, loses its columns.
        """
        return tuple(s for s in self.slices if s.axis == "in")

    @property
    def columns(self) -> Tensor:
        """int64 [units, width]: the consumer's input columns of each unit.

        Of a convolution, its input channels: each is as many columns of the flattened weight as
        the kernel has taps (:func:`ovsprune.graph.rows.flat_columns`).
        """
        for part in self.slices:
            if part.module == self.consumer and part.axis == "in":
                return part.rows
        raise AssertionError(f"group {self.name} has no slice of its consumer {self.consumer}")


@dataclass(frozen=True, eq=False)
class Scores:
    """What a criterion says.

    Attributes:
        costs: Group name to float [units]: what removing the unit costs, in the order of removal's
            own terms; larger is more important.
        orders: Group name to int64 [units]: units in the order of removal, first to go first.
    """

    costs: Mapping[str, Tensor]
    orders: Mapping[str, Tensor]

    @classmethod
    def from_costs(cls, costs: Mapping[str, Tensor]) -> Scores:
        """Scores whose order is the ascending cost (stable)."""
        return cls(costs, {k: torch.argsort(v, stable=True) for k, v in costs.items()})


@dataclass(frozen=True, eq=False)
class Curves:
    """Error by width for each group, measured.

    Attributes:
        widths: Group name to int64 [k], ascending, the last being the dense width.
        errors: Group name to float [k]: error of the tower's output when that group alone has that
            width; 0 at the dense width.
    """

    widths: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which units stay.

    Attributes:
        kept: Group name to int64 [kept], ascending indices in the dense coordinates.
    """

    kept: Mapping[str, Tensor]

    def width(self, name: str) -> int:
        """Number of units that stay in group ``name``."""
        return int(self.kept[name].numel())
