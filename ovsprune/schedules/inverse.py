"""The opposite of the paper's policy, as a control."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import Once, highest, wanted

__all__ = ["Inverse"]


@POLICIES.register("inverse")
class Inverse(Once):
    """Layers with the smallest alphas at the start: the control of alpha."""

    needs_spectra = True

    def choose(self, item: ScheduleContext) -> set[str]:
        """The share ``item.fraction`` of the layers with the smallest alphas."""
        alphas = item.alphas
        assert alphas is not None
        return highest(item, wanted(item), lambda layer: -alphas[layer.name])
