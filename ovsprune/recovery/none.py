"""Recovery `none`: leave the cut tower unchanged."""

from __future__ import annotations

from ovsprune.core.protocols import RecoveryContext
from ovsprune.recovery import RECOVERIES

__all__ = ["Nothing"]


@RECOVERIES.register("none")
class Nothing:
    """Leave the cut tower unchanged."""

    trains = False
    after: str | None = None

    def recover(self, ctx: RecoveryContext) -> None:
        """Do nothing."""
