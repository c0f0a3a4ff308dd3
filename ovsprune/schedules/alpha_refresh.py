"""The largest alphas, measured again as the weights change."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import highest, wanted

__all__ = ["AlphaRefresh"]


@POLICIES.register("alpha-refresh")
class AlphaRefresh:
    """As alpha, but from the weights as they are, asked anew every so many steps."""

    needs_spectra = True
    current = True

    def moments(self, total_steps: int, every: int) -> range:
        """Every ``every`` steps."""
        return range(0, total_steps, every)

    def choose(self, item: ScheduleContext) -> set[str]:
        """The share ``item.fraction`` of the layers with the largest alphas now."""
        alphas = item.alphas
        assert alphas is not None
        return highest(item, wanted(item), lambda layer: alphas[layer.name])
