"""Policy that measures the alphas again during the training."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import layers_to_train, top_layers

__all__ = ["AlphaRefresh"]


@POLICIES.register("alpha-refresh")
class AlphaRefresh:
    """Like alpha, but with the current weights: the choice is repeated every few steps."""

    needs_spectra = True
    needs_current_spectra = True

    def decision_steps(self, total_steps: int, every: int) -> range:
        """Return every ``every``-th step."""
        return range(0, total_steps, every)

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the fraction ``ctx.fraction`` of the layers with the largest current alphas."""
        alphas = ctx.alphas
        assert alphas is not None
        return top_layers(ctx, layers_to_train(ctx), lambda layer: alphas[layer.name])
