"""Hooks that run a plan in the training loops of other libraries, one library per file.

A library is imported only when its file is imported, for example by
``from ovsprune.schedules.loops.detectron2 import ScheduleHook``. Each hook calls
:meth:`~ovsprune.schedules.TrainPlan.step` before every optimiser step, drops the optimiser state of
frozen parameters, and saves the state of the plan in the library's checkpoints. If only the library
knows the length of the training, give the hook a function that makes the plan
(``functools.partial(ovsprune.schedule, policy="alpha-refresh")``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ovsprune.schedules.plan import TrainPlan

__all__ = ["PlanFollower", "PlanOrFactory"]

PlanOrFactory = TrainPlan | Callable[..., TrainPlan]
"""A plan, or a function that is called as ``make(model, total_steps=n)`` and returns one."""


class PlanFollower:
    """Runs a plan in one training of a library's loop, and in its checkpoints.

    A plan that may change during the training is held open until the training begins. Optimisers
    and wrappers that are made before then register every parameter that will train.

    Args:
        plan: The plan, or a function that makes it when the training begins.

    Attributes:
        plan: The plan; None before the training begins.
    """

    def __init__(self, plan: PlanOrFactory) -> None:
        self._plan_or_factory = plan
        self._state: Mapping[str, Any] | None = None
        self.plan: Any = None
        if isinstance(plan, TrainPlan) and plan.changes:
            plan.hold()  # until begin() closes it

    def begin(self, model: Any, total_steps: int, *optimizers: Any) -> None:
        """Make the plan if needed, load its saved state, and bind the optimisers.

        The optimisers are bound last: they may hold restored states, and only the states of
        parameters that are frozen at the resumed step are dropped.

        Args:
            model: The model as the loop runs it, with its wrapper if it has one.
            total_steps: Optimiser steps of the whole training.
            optimizers: The optimisers of the loop.

        Raises:
            ScheduleError: The wrapper, or a training in several processes, cannot follow the plan.
        """
        if isinstance(self._plan_or_factory, TrainPlan):
            self.plan = self._plan_or_factory
            self.plan.close()
        else:
            self.plan = self._plan_or_factory(model, total_steps=total_steps)
            self.plan.made_late()  # the loop may have wrapped the model already
        self.plan.check_wrapper(model)
        if self._state:
            self.plan.load_state_dict(self._state)
        self.plan.bind(*optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the library's checkpoint; empty before the training begins."""
        return {} if self.plan is None else dict(self.plan.state_dict())

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Load the state from a checkpoint, before or after the training has begun."""
        self._state = state
        if self.plan is not None and state:
            self.plan.load_state_dict(state)
