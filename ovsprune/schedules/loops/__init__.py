"""A plan in people's training loops, one library a file; none is imported until it is asked for.

``from ovsprune.schedules.loops.detectron2 import ScheduleHook`` and so on. Every one of them calls
:meth:`~ovsprune.schedules.TrainPlan.step` before each optimiser step, has the optimiser lose its
state of what is frozen, and keeps the plan's state in the library's own checkpoints. Instead of a
plan each takes a function that makes one, for when the length of the training is known to the
library only (``functools.partial(ovsprune.schedule, policy="alpha-refresh")``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ovsprune.schedules.plan import TrainPlan

__all__ = ["Following", "Made"]

Made = TrainPlan | Callable[..., TrainPlan]
"""A plan, or a function of the model, positional, and ``total_steps=...``, by name."""


class Following:
    """A plan through one training of a library's loop, and through its checkpoints.

    A plan that is given and may change its mind is held open until the training begins, so that
    optimisers and wrappers which are made until then take in all that it will train.

    Args:
        made: The plan, or what makes it when the training begins.

    Attributes:
        plan: The plan, once the training has begun.
    """

    def __init__(self, made: Made) -> None:
        self._made = made
        self._state: Mapping[str, Any] | None = None
        self.plan: Any = None
        if isinstance(made, TrainPlan) and made.changes:
            made.hold()

    def begin(self, model: Any, total_steps: int, *optimizers: Any) -> None:
        """Have the plan, go on where a resumed training was, and bind its optimisers.

        In this order: the optimisers may have their states of before already, and lose only those
        of what is frozen there.

        Args:
            model: As the loop runs it, wrapped where it is.
            total_steps: Optimiser steps.
            optimizers: Of the loop.

        Raises:
            ScheduleError: A wrapper, or several processes, cannot follow the plan.
        """
        if isinstance(self._made, TrainPlan):
            self.plan = self._made
            self.plan.close()
        else:
            self.plan = self._made(model, total_steps=total_steps)
            self.plan.made_late()
        self.plan.check_wrapper(model)
        if self._state:
            self.plan.load_state_dict(self._state)
        self.plan.bind(*optimizers)

    def state_dict(self) -> dict[str, Any]:
        """What goes into the library's checkpoint; nothing before the training."""
        return {} if self.plan is None else dict(self.plan.state_dict())

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """What comes out of one, before or after the training has begun."""
        self._state = state
        if self.plan is not None and state:
            self.plan.load_state_dict(state)
