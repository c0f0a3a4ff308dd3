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
    """Cost of one forward pass over one image.

    Attributes:
        macs: Multiply-accumulates (FLOPs / 2 of torch's FlopCounterMode, fast path off).
        params: Number of parameters.
    """

    macs: int
    params: int

    def of(self, budget: str) -> int:
        """Return the cost that a budget of this kind counts: ``"macs"`` or ``"params"``."""
        return {"macs": self.macs, "params": self.params}[budget]


@dataclass(frozen=True)
class Preprocess:
    """Conversion of images to the tower's input.

    Attributes:
        size: Input height and width in pixels.
        mean: Mean of each colour channel, in [0, 1], to subtract.
        std: Standard deviation of each colour channel, to divide by.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize_mode: ``"shortest"`` (resize the shorter side, centre crop), ``"squash"``, or
            ``"longest"``, as in open_clip.
    """

    size: tuple[int, int]
    # The defaults are those of OpenAI's CLIP.
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"


# eq=False in records that hold tensors: == of two tensors gives a tensor, not True or False.
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
        rows: int64 [units, width]: row u holds the indices of unit u on that axis.
    """

    module: str
    axis: Axis
    rows: Tensor


@dataclass(frozen=True)
class StreamPoint:
    """Position at which to read the residual stream, after a consumer's output was added to it.

    Attributes:
        module: Dotted name of a layer of the tower.
        side: ``"input"`` if the layer's input is the stream, ``"output"`` if its output is.
        axis: Channel axis of the stream; None if it is that of the consumer's output. A linear
            consumer may map [B, h, w, n] to [B, h, w, C] and be followed by a permutation: the
            stream is then [B, C, h, w], and its channel axis is 1.
    """

    module: str
    side: Literal["input", "output"]
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Coupled slices of several layers, divided into units (heads, hidden neurons, channels).

    Removing a unit removes its indices from every slice of the group.

    Attributes:
        name: Unique name, the dotted path of the pruned part (``"transformer.resblocks.3.attn"``).
        kind: Kind of unit: ``"heads"``, ``"mlp"`` or ``"channels"``.
        units: Number of units.
        slices: All slices of all layers that belong to the units.
        consumer: Dotted name of the projection that reads the units. It has an ``"in"`` slice, and
            the activations of the units are recorded at its input.
        block: Dotted name of the block that contains the group; blocks run in sequence.
        stream: Position of the residual stream after the consumer; None without a residual.
        norms: Dotted names of the norms between the units and the consumer.
        macs: MACs of one unit at the native resolution.
        params: Parameters of one unit.
        min_units: Smallest number of units to keep. With 0, all units may be removed, and the
            consumer then outputs its bias.
        shared: Name of another group to the cost that one unit of each group shares. A layer that
            reads the units of one group and makes those of the other costs the product of both
            widths, so ``macs`` and ``params`` of either group include the full width of the other.
            Only one of the two groups has the entry.
        gating_layers: Dotted names of layers that compute a factor for each unit from the units
            themselves, such as the second layer of squeeze-and-excitation.
        cut_before: True if an earlier prune removed units of this group. ``units`` is then not the
            width of the original architecture.
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
        """Slices of all layers that read the units. Masking a unit zeroes it for all of them.

        Scores and refits use the consumer only. Other readers, such as squeeze-and-excitation,
        lose the columns of removed units and are not refitted.
        """
        return tuple(s for s in self.slices if s.axis == "in")

    @property
    def columns(self) -> Tensor:
        """int64 [units, width]: input columns of the consumer that belong to each unit.

        For a convolution these are input channels; :func:`ovsprune.graph.rows.flat_columns` gives
        the columns of the flattened weight, one per kernel position.
        """
        for part in self.slices:
            if part.module == self.consumer and part.axis == "in":
                return part.rows
        raise AssertionError(f"group {self.name} has no slice of its consumer {self.consumer}")


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance scores and removal orders of all groups.

    Attributes:
        costs: Group name to float [units]: score of each unit; larger means more important.
        orders: Group name to int64 [units]: units in the order of removal.
    """

    costs: Mapping[str, Tensor]
    orders: Mapping[str, Tensor]

    @classmethod
    def from_costs(cls, costs: Mapping[str, Tensor]) -> Scores:
        """Return scores whose removal order is by ascending cost (stable sort)."""
        # Stable, so that units of equal cost have the same order on every machine.
        return cls(costs, {k: torch.argsort(v, stable=True) for k, v in costs.items()})


@dataclass(frozen=True, eq=False)
class Curves:
    """Measured error of each group as a function of its width.

    Attributes:
        widths: Group name to int64 [k], ascending; the last entry is the dense width.
        errors: Group name to float [k]: error of the tower's output with only this group reduced
            to the width; 0 at the dense width.
    """

    widths: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """Selection of the units to keep.

    Attributes:
        kept: Group name to int64 [kept]: ascending unit indices in the dense tower.
    """

    kept: Mapping[str, Tensor]

    def width(self, name: str) -> int:
        """Return the number of units kept in group ``name``."""
        return int(self.kept[name].numel())
