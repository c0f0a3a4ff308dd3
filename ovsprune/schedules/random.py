"""Layers drawn by lot, as the baseline."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import Once, wanted

__all__ = ["Random"]


@POLICIES.register("random")
class Random(Once):
    """As many layers, drawn by the seed: the baseline of every other policy."""

    needs_spectra = False

    def choose(self, item: ScheduleContext) -> set[str]:
        """A draw without replacement, the same for the same seed and model."""
        order = torch.randperm(len(item.layers), generator=item.generator)
        return {item.layers[i].name for i in order[: wanted(item)].tolist()}
