"""Importance criteria: score and rank the units of one group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ovsprune.core.records import Group

__all__ = [
    "NEEDS",
    "Criterion",
    "Forward",
    "GradientCriterion",
    "GroupContext",
    "Moments",
    "Objective",
    "Ranking",
]


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of a consumer's input on the calibration images.

    Attributes:
        count: Number of input rows (tokens or positions).
        mean: Mean of the rows, float64 [n].
        covariance: Centred covariance of the rows, float64 [n, n].
    """

    count: int
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class GroupContext:
    """Inputs of a criterion for one group.

    Attributes:
        group: The group to score.
        layers: Dotted name to layer, for every layer of the group's slices.
        moments: Moments of the consumer's input on the calibration images; None unless the
            criterion needs ``"moments"`` or curves are measured.
        ridge: Ridge added to the diagonal of the covariance, relative to the mean of the diagonal.
        generator: Random generator, seeded for this group.
        snapshots: Widths for which the allocator needs the refitted weight. A criterion that
            computes these weights returns them, so that they are not computed twice.
        gradients: float64 [samples, units]: derivative of the criterion's objective with respect
            to the mask of each unit, at mask value 1. The mask is a factor on the unit's columns
            of every reader. One row per image, or per value of the objective if it has several
            values per image. None unless the criterion needs ``"gradients"``.
    """

    group: Group
    layers: Mapping[str, nn.Module]
    moments: Moments | None
    ridge: float
    generator: torch.Generator
    snapshots: tuple[int, ...] = ()
    gradients: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores and removal order of the units of one group.

    Attributes:
        costs: Score of each unit, float64 [units], finite and non-negative.
        order: Units in the order of removal, int64 [units].
        weights: Width to the consumer's weight refitted for that width, float64 [m, n]; may be
            empty.
    """

    costs: Tensor
    order: Tensor
    weights: Mapping[int, Tensor] = field(default_factory=dict)


NEEDS = frozenset({"moments", "gradients", "norms"})
"""Inputs that a criterion can request; see :class:`Criterion`."""


class Criterion(Protocol):
    """Importance criterion for the units of a group.

    A criterion whose costs have the same scale in every group (for example, the estimated change
    of one loss) may set ``comparable = True``; see :class:`AllocationContext`.
    """

    needs: frozenset[str]
    """Inputs that the criterion requires: a subset of :data:`NEEDS`.

    ``"moments"``: :attr:`GroupContext.moments`. ``"gradients"``: :attr:`GroupContext.gradients` of
    the criterion's own objective (:class:`GradientCriterion`). ``"norms"``: a norm between the
    units and their consumer; a model with a group that has no such norm is refused before any
    computation starts.
    """

    def score(self, ctx: GroupContext) -> Ranking:
        """Score and rank the units of ``ctx.group``, independently of the types of the layers."""
        ...


Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function from images [b, 3, H, W] to (pooled [b, C], dense [b, C, h, w])."""


class Objective(Protocol):
    """Differentiable function of a tower's outputs whose gradients a criterion uses."""

    def __call__(self, forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
        """Compute one or several values for each image.

        Args:
            forward: The tower with one mask per unit and image. The input must have the batch size
                of ``images``. It may be called several times, also without gradients.
            images: float32 [b, 3, H, W], preprocessed. Each calibration image occurs once, in a
                fixed order.
            generator: Random generator on the CPU. Draw for one image at a time, so that the
                numbers do not depend on the batch size.

        Returns:
            [b], or [b, r] for r values per image, each of which is differentiated. The values of
            an image must depend on that image only.
        """
        ...


class GradientCriterion(Criterion, Protocol):
    """Criterion that needs ``"gradients"``."""

    objective: Objective
    """Function whose gradients are computed."""
