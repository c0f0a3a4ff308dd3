"""The last layers of the model."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import Once, wanted

__all__ = ["LastK"]


@POLICIES.register("last-k")
class LastK(Once):
    """The last layers in the order of the model, as many as ``count`` or the share says."""

    needs_spectra = False

    def choose(self, item: ScheduleContext) -> set[str]:
        """Names of the last ones."""
        return {layer.name for layer in item.layers[len(item.layers) - wanted(item) :]}
