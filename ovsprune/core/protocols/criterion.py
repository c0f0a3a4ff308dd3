"""Importance criteria: rank the units of one group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ovsprune.core.records import (
    Group,
)

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
    """First and second moments of what a consumer reads.

    Attributes:
        count: Number of rows (tokens or positions) seen.
        mean: float64 [n].
        covariance: float64 [n, n], centred.
    """

    count: int
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class GroupContext:
    """What a criterion sees of one group.

    Attributes:
        group: The group.
        layers: Dotted name to layer, for every layer of the group's slices.
        moments: Moments of the consumer's input on calibration pictures; None unless the criterion
            needs ``"moments"``, or curves are measured.
        ridge: What is added to the covariance's diagonal, relative to its mean.
        generator: Seeded for this group.
        snapshots: Widths whose refitted weight an allocator will want; a criterion that has them at
            hand returns them, and spares a second elimination.
        gradients: float64 [samples, units]: derivative of the criterion's objective with respect to
            the unit's mask, a factor of 1 on the unit's columns of whatever reads it; a row
            for each picture, or for each of the objective's values of each picture. None unless the
            criterion needs ``"gradients"``.
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
    """One group's units, ranked.

    Attributes:
        costs: float64 [units], finite, 0 or more.
        order: int64 [units], first to be removed first.
        weights: Width -> float64 [m, n], the consumer's weight refitted for that width; may be
            empty.
    """

    costs: Tensor
    order: Tensor
    weights: Mapping[int, Tensor] = field(default_factory=dict)


NEEDS = frozenset({"moments", "gradients", "norms"})
"""What a criterion can ask for; see :class:`Criterion`."""


class Criterion(Protocol):
    """Ranks the units of a group.

    A criterion whose costs mean the same in every group (an estimated change of one loss) may say
    ``comparable = True``; see :class:`AllocationContext`.
    """

    needs: frozenset[str]
    """What must be there to rank a group: members of :data:`NEEDS`.

    ``"moments"``: :attr:`GroupContext.moments`. ``"gradients"``: :attr:`GroupContext.gradients`, of
    the criterion's own objective (:class:`GradientCriterion`). ``"norms"``: a norm between the
    units and their consumer; where a group has none the survey refuses, before any work is done.
    """

    def score(self, ctx: GroupContext) -> Ranking:
        """Rank ``item.group``'s units. No criterion asks what type a layer has."""
        ...


Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [b, 3, H, W] -> (pooled [b, C], dense [b, C, h, w])."""


class Objective(Protocol):
    """What a tower's units are wanted for, as numbers that can be differentiated."""

    def __call__(self, forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
        """Value or values of each picture.

        Args:
            forward: The tower with a mask on each unit of each picture. It takes as many images as
                ``images`` has, and may be called several times, also without gradient.
            images: float32 [b, 3, H, W], preprocessed; every calibration picture comes once, in a
                fixed order.
            generator: On the CPU. What is drawn picture by picture does not depend on how many
                pictures come at a time.

        Returns:
            [b], or [b, r] for r values of each picture, of which each is differentiated. A
            picture's values depend on that picture alone.
        """
        ...


class GradientCriterion(Criterion, Protocol):
    """A criterion that needs ``"gradients"``."""

    objective: Objective
