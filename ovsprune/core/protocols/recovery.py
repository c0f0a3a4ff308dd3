"""Recoveries: repair a cut tower in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from ovsprune.core.distillation import Distillation
from ovsprune.core.progress import Progress
from ovsprune.core.protocols.backbone import Stages
from ovsprune.core.protocols.images import Pictures
from ovsprune.core.records import Group, Plan

__all__ = ["Recovery", "RecoveryContext"]


@dataclass(frozen=True, eq=False)
class RecoveryContext:
    """Inputs of a recovery.

    Attributes:
        dense: Dense tower in rewritten form, whose outputs are the target. Not modified.
        slim: Cut tower in the same rewritten form (separate linear layers). Modified in place.
        stages: Returns either tower as a sequence of blocks.
        groups: Groups in the coordinates of the dense tower.
        plan: Units that ``slim`` keeps.
        pictures: Calibration images.
        batch_size: Number of images per batch.
        ridge: Ridge of the least-squares fits, relative to the mean variance of a layer's input.
        seed: Seed of the random generators.
        progress: Progress reporter.
        distill: Options of recoveries that train.
        unseen: Further images from the same source that no recovery fits, for validation; None if
            there are none.
    """

    dense: nn.Module
    slim: nn.Module
    stages: Callable[[nn.Module], Stages]
    groups: Sequence[Group]
    plan: Plan
    pictures: Pictures
    batch_size: int
    ridge: float
    seed: int
    progress: Progress
    distill: Distillation = field(default_factory=Distillation)
    unseen: Pictures | None = None


class Recovery(Protocol):
    """Repair of a cut tower, in place."""

    trains: bool
    """True if it takes gradient steps; the checkpoint's provenance records this."""
    after: str | None
    """Name of the recovery that runs before this one, or None."""

    def recover(self, ctx: RecoveryContext) -> None:
        """Repair ``ctx.slim`` in place. If the plan keeps all units, nothing may change.

        Values of parameters and buffers may change; their shapes and the modules may not.
        """
        ...
