"""Control policies, and the helpers that all policies share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ovsprune.core.protocols import Layer, ScheduleContext
from ovsprune.schedules import POLICIES

__all__ = [
    "AdaptersOnly",
    "Everything",
    "FirstK",
    "Inverse",
    "LastK",
    "Nothing",
    "Once",
    "Random",
    "layers_to_train",
    "top_layers",
]


class Once:
    """Base class of the policies that choose once, before the first step."""

    needs_current_spectra = False
    needs_spectra = False

    def decision_steps(self, total_steps: int, every: int) -> tuple[int, ...]:
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
    # The small offset keeps rounding errors (0.3 * 10 = 3.0000000000000004) from adding a layer.
    return min(n, math.ceil(n * share - 1e-9))


def top_layers(ctx: ScheduleContext, count: int, key: Callable[[Layer], float]) -> set[str]:
    """Return the names of the ``count`` layers with the largest ``key``.

    Ties go to the layer that comes first in the model: ``sorted`` is stable, also in reverse.
    """
    ranked = sorted(ctx.layers, key=key, reverse=True)
    return {layer.name for layer in ranked[:count]}


@POLICIES.register("all")
class Everything(Once):
    """All layers of the pool."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return every name."""
        return {layer.name for layer in ctx.layers}


@POLICIES.register("none")
class Nothing(Once):
    """No layer of the pool; only parameters outside the pool train."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return an empty set."""
        return set()


@POLICIES.register("first-k")
class FirstK(Once):
    """The first layers in the order of the model, as many as ``count`` or ``fraction`` asks for."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the names of the first layers."""
        return {layer.name for layer in ctx.layers[: layers_to_train(ctx)]}


@POLICIES.register("last-k")
class LastK(Once):
    """The last layers in the order of the model, as many as ``count`` or ``fraction`` asks for."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the names of the last layers."""
        return {layer.name for layer in ctx.layers[len(ctx.layers) - layers_to_train(ctx) :]}


@POLICIES.register("random")
class Random(Once):
    """Layers drawn at random with the seed; the baseline for every other policy."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Draw names without replacement; equal seeds and models give equal draws."""
        order = torch.randperm(len(ctx.layers), generator=ctx.generator)
        return {ctx.layers[i].name for i in order[: layers_to_train(ctx)].tolist()}


@POLICIES.register("inverse")
class Inverse(Once):
    """Layers with the smallest alphas before training; the control for ``alpha``."""

    needs_spectra = True

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the fraction ``ctx.fraction`` of the layers with the smallest alphas."""
        alphas = ctx.alphas
        assert alphas is not None
        return top_layers(ctx, layers_to_train(ctx), lambda layer: -alphas[layer.name])


@POLICIES.register("adapters-only")
class AdaptersOnly(Once):
    """Layers of the pool outside the image tower; the tower stays frozen."""

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the names outside the tower; none if the pool is the tower alone (default)."""
        return {layer.name for layer in ctx.layers if not layer.tower}
