"""Control policies, and helpers of all policies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES

__all__ = [
    "AdaptersOnly",
    "Everything",
    "FirstK",
    "LastK",
    "Nothing",
    "Once",
    "Random",
    "layers_to_train",
]


class Once:
    """Base class of the policies that choose once, before the first step."""

    needs_current_spectra = False
    needs_spectra = False

    def decision_steps(self, total_steps: int, every: int) -> Sequence[int]:
        """Return step 0 as the only decision step."""
        return (0,)


def layers_to_train(ctx: ScheduleContext, fraction: float | None = None) -> int:
    """Return the number of layers that train.

    It is ``ctx.count`` if that is set, otherwise the fraction of the pool, rounded up. Half of an
    odd number of layers includes the middle one, as "at or above the median" does.

    Args:
        ctx: Context of the decision.
        fraction: Replaces ``ctx.fraction`` and ``ctx.count``, in [0, 1].

    Example:
        >>> from types import SimpleNamespace
        >>> layers_to_train(SimpleNamespace(layers=range(7), fraction=0.5, count=None))
        4
    """
    n = len(ctx.layers)
    if ctx.count is not None and fraction is None:
        return min(ctx.count, n)
    share = ctx.fraction if fraction is None else fraction
    # The small offset keeps rounding errors (0.28 * 25 = 7.000000000000001) from adding a layer.
    return min(n, math.ceil(n * share - 1e-9))


@POLICIES.register("all")
class Everything(Once):
    """Train all layers of the pool."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return every name."""
        return {layer.name for layer in ctx.layers}


@POLICIES.register("none")
class Nothing(Once):
    """Train no layer of the pool, only parameters outside it."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return an empty set."""
        return set()


@POLICIES.register("first-k")
class FirstK(Once):
    """Train the first layers in the order of the model, by ``count`` or ``fraction``."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the names of the first layers."""
        return {layer.name for layer in ctx.layers[: layers_to_train(ctx)]}


@POLICIES.register("last-k")
class LastK(Once):
    """Train the last layers in the order of the model, by ``count`` or ``fraction``."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the names of the last layers."""
        # Counted from the front: with 0 layers to train, layers[-0:] would be all layers.
        return {layer.name for layer in ctx.layers[len(ctx.layers) - layers_to_train(ctx) :]}


@POLICIES.register("random")
class Random(Once):
    """Train layers drawn at random with the seed; the baseline for every other policy."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Draw names without replacement; equal seeds and models give equal draws."""
        order = torch.randperm(len(ctx.layers), generator=ctx.generator)
        return {ctx.layers[i].name for i in order[: layers_to_train(ctx)].tolist()}


@POLICIES.register("adapters-only")
class AdaptersOnly(Once):
    """Train the layers of the pool outside the image tower; the tower stays frozen."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the names outside the tower; none if the pool is the tower alone (default)."""
        return {layer.name for layer in ctx.layers if not layer.tower}
