"""No layer at all: what is outside the pool trains alone."""

from __future__ import annotations

from ovsprune.core.protocols import ScheduleContext
from ovsprune.schedules import POLICIES
from ovsprune.schedules.choosing import Once

__all__ = ["Nothing"]


@POLICIES.register("none")
class Nothing(Once):
    """No layer of the pool."""

    needs_spectra = False

    def choose(self, item: ScheduleContext) -> set[str]:
        """No name."""
        return set()
