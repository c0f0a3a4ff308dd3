"""Policy that starts with the largest alphas and adds layers during the training."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import layers_to_train, top_layers

__all__ = ["AlphaProgressive"]


@POLICIES.register("alpha-progressive")
class AlphaProgressive:
    """Like alpha, but the fraction that trains grows linearly up to all layers."""

    needs_spectra = True
    needs_current_spectra = False

    def decision_steps(self, total_steps: int, every: int) -> range:
        """Return every ``every``-th step."""
        return range(0, total_steps, every)

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the fraction ``f + (1 - f) t`` of the layers with the largest alphas.

        ``f`` is ``ctx.fraction`` and ``t`` the elapsed part of the training, in [0, 1). The alphas
        are those before training, so the ranking is fixed and a layer that trains stays in.
        """
        alphas = ctx.alphas
        assert alphas is not None
        start = layers_to_train(ctx) / len(ctx.layers)
        share = start + (1 - start) * ctx.step / ctx.total_steps
        return top_layers(ctx, layers_to_train(ctx, share), lambda layer: alphas[layer.name])
