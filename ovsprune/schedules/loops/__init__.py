"""A plan in people's training loops, one library a file; none is imported until it is asked for.

``from ovsprune.schedules.loops.detectron2 import ScheduleHook`` and so on. Every one of them calls
:meth:`~ovsprune.schedules.TrainPlan.step` before each optimiser step, has the optimiser lose its
state of what is frozen, and keeps the plan's state in the library's own checkpoints. Instead of a
plan each takes a function that makes one, for when the length of the training is known to the
library only (``functools.partial(ovsprune.schedule, policy="alpha-refresh")``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ovsprune.schedules.plan import TrainPlan

__all__ = ["Made", "plan_for"]

Made = TrainPlan | Callable[..., TrainPlan]
"""A plan, or a function of the model, positional, and ``total_steps=...``, by name."""


def plan_for(made: Made, model: Any, total_steps: int) -> TrainPlan:
    """The plan of a training that is about to start."""
    return made if isinstance(made, TrainPlan) else made(model, total_steps=total_steps)
