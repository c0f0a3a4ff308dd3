"""Schedules: which layers train when. One policy a file; loops of frameworks are in ``loops``.

See :class:`ovsprune.core.protocols.Policy`. ``ovsprune.schedule(model, ...)`` makes a
:class:`TrainPlan`.
"""

from ovsprune.core.protocols import Policy
from ovsprune.core.registry import Registry
from ovsprune.schedules.plan import TrainPlan

__all__ = ["POLICIES", "TrainPlan"]

POLICIES: Registry[Policy] = Registry("policy", "ovsprune.schedules")
