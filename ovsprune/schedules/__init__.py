"""Training schedules: policies that choose which layers train at which step.

Each policy implements :class:`ovsprune.core.protocols.Policy` and registers itself in
:data:`POLICIES`. ``ovsprune.schedule(model, ...)`` builds a :class:`TrainPlan` from one. Hooks for
the training loops of other libraries are in :mod:`ovsprune.schedules.loops`.
"""

from ovsprune.core.protocols import Policy
from ovsprune.core.registry import Registry
from ovsprune.schedules.plan import TrainPlan

__all__ = ["POLICIES", "TrainPlan"]

POLICIES: Registry[Policy] = Registry("policy", "ovsprune.schedules")
