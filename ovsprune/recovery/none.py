"""No recovery: the cut tower as it is."""

from __future__ import annotations

from ovsprune.core.protocols import RecoveryContext
from ovsprune.recovery import RECOVERIES

__all__ = ["Nothing"]


@RECOVERIES.register("none")
class Nothing:
    """Leave the cut tower as it is."""

    trains = False
    after: str | None = None

    def recover(self, ctx: RecoveryContext) -> None:
        """Do nothing."""
