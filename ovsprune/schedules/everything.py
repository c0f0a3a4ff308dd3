"""All layers, which is what training was without a schedule."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import Once

__all__ = ["Everything"]


@POLICIES.register("all")
class Everything(Once):
    """All layers of the pool."""

    needs_spectra = False

    def choose(self, item: ScheduleContext) -> set[str]:
        """Every name."""
        return {layer.name for layer in item.layers}
