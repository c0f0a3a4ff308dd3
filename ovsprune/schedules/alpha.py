"""Policies that rank layers by the power-law exponents (alphas) of their spectra.

A heavy tail (a small alpha) indicates a well-trained layer (Martin and Mahoney 2021), so OpenTrans
(Xu et al. 2024, section 3.3) freezes the layers below the median.
"""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import Once, layers_to_train

__all__ = ["Alpha", "AlphaProgressive", "AlphaRefresh", "Inverse"]


@POLICIES.register("alpha")
class Alpha(Once):
    """Layers with the largest alphas before training; half: at or above the median (OpenTrans)."""

    needs_spectra = True

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the fraction ``ctx.fraction`` of the layers with the largest alphas."""
        return _ranked(ctx, layers_to_train(ctx))


@POLICIES.register("inverse")
class Inverse(Once):
    """Layers with the smallest alphas before training; the control for ``alpha``."""

    needs_spectra = True

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the fraction ``ctx.fraction`` of the layers with the smallest alphas."""
        return _ranked(ctx, layers_to_train(ctx), sign=-1)


@POLICIES.register("alpha-refresh")
class AlphaRefresh(Alpha):
    """Like alpha, but with the current weights: the choice is repeated every few steps."""

    needs_current_spectra = True

    def decision_steps(self, total_steps: int, every: int) -> range:
        """Return every ``every``-th step."""
        return range(0, total_steps, every)


@POLICIES.register("alpha-progressive")
class AlphaProgressive(AlphaRefresh):
    """Like alpha, but the fraction that trains grows linearly up to all layers."""

    needs_current_spectra = False  # unlike the base class: the ranking stays fixed

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the fraction ``f + (1 - f) t`` of the layers with the largest alphas.

        ``f`` is ``ctx.fraction`` and ``t`` the elapsed part of the training, in [0, 1). The alphas
        are those before training, so the ranking is fixed and a layer that trains stays in.
        """
        start = layers_to_train(ctx) / len(ctx.layers)
        share = start + (1 - start) * ctx.step / ctx.total_steps
        return _ranked(ctx, layers_to_train(ctx, share))


def _ranked(ctx: ScheduleContext, count: int, sign: int = 1) -> set[str]:
    """Return the names of the ``count`` layers with the largest ``sign * alpha``.

    Ties go to the layer that comes first in the model: ``sorted`` is stable, also in reverse.
    """
    alphas = ctx.alphas
    assert alphas is not None  # all policies in this file set needs_spectra
    ranked = sorted(ctx.layers, key=lambda layer: sign * alphas[layer.name], reverse=True)
    return {layer.name for layer in ranked[:count]}
