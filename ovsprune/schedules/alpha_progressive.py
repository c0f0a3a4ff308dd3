"""Largest alphas first, and more of them as the training goes on."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import highest, wanted

__all__ = ["AlphaProgressive"]


@POLICIES.register("alpha-progressive")
class AlphaProgressive:
    """As alpha, but the share that trains grows evenly over the run, towards all layers."""

    needs_spectra = True
    current = False

    def moments(self, total_steps: int, every: int) -> range:
        """Every ``every`` steps."""
        return range(0, total_steps, every)

    def choose(self, item: ScheduleContext) -> set[str]:
        """The share ``f + (1 - f) t`` of the largest alphas of the start, t the part that is over.

        What trains once trains to the end, since the order stays.
        """
        alphas = item.alphas
        assert alphas is not None
        start = wanted(item) / len(item.layers)
        share = start + (1 - start) * item.step / item.total_steps
        return highest(item, wanted(item, share), lambda layer: alphas[layer.name])
