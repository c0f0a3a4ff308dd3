"""Plug-in interfaces, one module per kind of plug-in.

A plug-in is one class in one file of its room, with the room's decorator::

    @CRITERIA.register("mine")
    class Mine:
        needs = frozenset({"moments"})  # or "gradients", "norms", or nothing
        def score(self, ctx: GroupContext) -> Ranking: ...

Nothing is inherited. The contract tests run over every registered name.
"""

from ovsprune.core.protocols.allocator import AllocationContext, Allocator, Budget
from ovsprune.core.protocols.backbone import Backbone, Family, PrunableLayer, Stages
from ovsprune.core.protocols.criterion import (
    NEEDS,
    Criterion,
    Forward,
    GradientCriterion,
    GroupContext,
    Moments,
    Objective,
    Ranking,
)
from ovsprune.core.protocols.images import EndlessPictures, Pictures
from ovsprune.core.protocols.policy import Layer, Policy, ScheduleContext
from ovsprune.core.protocols.recovery import Recovery, RecoveryContext

__all__ = [
    "NEEDS",
    "AllocationContext",
    "Allocator",
    "Backbone",
    "Budget",
    "Criterion",
    "EndlessPictures",
    "Family",
    "Forward",
    "GradientCriterion",
    "GroupContext",
    "Layer",
    "Moments",
    "Objective",
    "Pictures",
    "Policy",
    "PrunableLayer",
    "Ranking",
    "Recovery",
    "RecoveryContext",
    "ScheduleContext",
    "Stages",
]
