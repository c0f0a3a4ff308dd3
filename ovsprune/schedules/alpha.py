"""Policy of the OpenTrans paper: the layers whose spectra have light tails train throughout."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import Once, layers_to_train, top_layers

__all__ = ["Alpha"]


@POLICIES.register("alpha")
class Alpha(Once):
    """Layers with the largest alphas before training; half: at or above the median (OpenTrans)."""

    needs_spectra = True

    def choose(self, ctx: ScheduleContext) -> set[str]:
        """Return the fraction ``ctx.fraction`` of the layers with the largest alphas.

        A heavy tail (a small alpha) indicates a well-trained layer (Martin and Mahoney 2021).
        OpenTrans (Xu et al. 2024, section 3.3) freezes the layers below the median.
        """
        alphas = ctx.alphas
        assert alphas is not None
        return top_layers(ctx, layers_to_train(ctx), lambda layer: alphas[layer.name])
