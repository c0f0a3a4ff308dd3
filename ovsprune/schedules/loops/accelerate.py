"""accelerate: a plan in a loop that somebody writes with an ``Accelerator``."""

from __future__ import annotations

from typing import Any

from ovsprune.core.errors import ScheduleError
from ovsprune.schedules.plan import TrainPlan

__all__ = ["ScheduledSteps"]


class ScheduledSteps:
    """Counts the optimiser steps of a loop with gradient accumulation, and follows a plan.

    ::

        plan = ovsprune.schedule(model, total_steps=...)  # before accelerator.prepare
        optimizer = torch.optim.AdamW(plan.groups(lr=1e-4))
        with plan.open():  # what will train later is averaged over processes, too
            model, optimizer = accelerator.prepare(model, optimizer)
        steps = ScheduledSteps(accelerator, plan, optimizer)
        for batch in loader:
            with accelerator.accumulate(model):
                steps.begin()  # before the forward pass
                ...

    ``accelerator.save_state`` and ``load_state`` keep its count and the plan. With several
    processes a policy that changes its mind wants an ``Accelerator(kwargs_handlers=[
    DistributedDataParallelKwargs(find_unused_parameters=True)])``; a plan that does not change goes
    without that, and without ``open``.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        plan: The plan.
        optimizers: As ``accelerator.prepare`` gave them.

    Raises:
        ScheduleError: Nothing can be registered for the accelerator's checkpoints.
    """

    def __init__(self, accelerator: Any, plan: TrainPlan, *optimizers: Any) -> None:
        if not hasattr(accelerator, "register_for_checkpointing"):
            raise ScheduleError(
                f"{type(accelerator).__name__} is no accelerate.Accelerator, which keeps the "
                "plan's state in its checkpoints"
            )
        self.accelerator, self.plan = accelerator, plan
        self.count, self._fresh = 0, True
        plan.bind(*(getattr(o, "optimizer", o) for o in optimizers))
        accelerator.register_for_checkpointing(self)

    def begin(self) -> None:
        """Call it inside ``accelerator.accumulate``, before the forward pass.

        Raises:
            ScheduleError: Several processes could not follow the plan.
        """
        if self._fresh:
            self.plan.step(self.count)
        self._fresh = bool(self.accelerator.sync_gradients)  # this pass ends an optimiser step
        self.count += self._fresh

    def state_dict(self) -> dict[str, Any]:
        """What accelerate writes."""
        return {"count": self.count, "fresh": self._fresh, "plan": self.plan.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the training was."""
        self.plan.load_state_dict(state["plan"])
        self.count, self._fresh = int(state["count"]), bool(state["fresh"])
