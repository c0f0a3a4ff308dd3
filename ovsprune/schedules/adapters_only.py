"""A framework's own layers, and nothing of the image tower."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import Once

__all__ = ["AdaptersOnly"]


@POLICIES.register("adapters-only")
class AdaptersOnly(Once):
    """Layers of the pool outside the image tower; the tower stays frozen."""

    needs_spectra = False

    def choose(self, item: ScheduleContext) -> set[str]:
        """Names outside the tower: none where the pool is the tower alone, which is the default."""
        return {layer.name for layer in item.layers if not layer.tower}
