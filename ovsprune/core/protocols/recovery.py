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
from ovsprune.core.records import (
    Group,
    Plan,
)

__all__ = ["Recovery", "RecoveryContext"]


@dataclass(frozen=True, eq=False)
class RecoveryContext:
    """What a recovery sees: the dense tower, the cut one (to be changed in place), pictures.

    Attributes:
        dense: The dense tower, rewritten: what is to be come close to. Never changed.
        slim: The cut tower, in the same rewritten form (separate linear maps).
        stages: Either tower as a sequence of blocks.
        groups: In the dense tower's coordinates.
        plan: What ``slim`` keeps of them.
        pictures: Calibration pictures.
        batch_size: Pictures at a time.
        ridge: Relative to the mean variance of what a layer reads.
        seed: For recoveries that draw.
        progress: Shows the work.
        distill: For recoveries that train.
        unseen: Others of the same kind, which no recovery fits, to judge a training by; None where
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
    """Repairs a cut tower in place."""

    trains: bool
    """Whether it takes gradient steps; the job then says so in the checkpoint."""
    after: str | None
    """Name of the recovery that runs before it, or None."""

    def recover(self, ctx: RecoveryContext) -> None:
        """Change ``item.slim`` in place; a plan that keeps everything must leave it as it is.

        The values of its parameters and buffers may change, never its shapes or its modules.
        """
        ...
