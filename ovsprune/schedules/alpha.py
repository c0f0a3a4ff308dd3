"""The paper's policy: layers whose spectra have light tails train, from the start to the end."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import Once, highest, wanted

__all__ = ["Alpha"]


@POLICIES.register("alpha")
class Alpha(Once):
    """Layers with the largest alphas at the start: at or above the median for half (OpenTrans)."""

    needs_spectra = True

    def choose(self, item: ScheduleContext) -> set[str]:
        """The share ``item.fraction`` of the layers with the largest alphas.

        A heavy tail (a small alpha) is the mark of a layer that is trained well (Martin and Mahoney
        2021); OpenTrans (Xu et al. 2024, section 3.3) freezes the layers below the median.
        """
        alphas = item.alphas
        assert alphas is not None
        return highest(item, wanted(item), lambda layer: alphas[layer.name])
