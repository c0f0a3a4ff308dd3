"""Step counter for handwritten training loops with an accelerate ``Accelerator``."""

from __future__ import annotations

from typing import Any

from ovsprune.core.errors import ScheduleError
from ovsprune.schedules.plan import TrainPlan

__all__ = ["ScheduledSteps"]


class ScheduledSteps:
    """Counts the optimiser steps of a loop with gradient accumulation and runs a plan.

    ::

        plan = ovsprune.schedule(model, total_steps=...)  # before accelerator.prepare
        optimizer = torch.optim.AdamW(plan.groups(lr=1e-4))
        with plan.open():  # so that all that will train is averaged over processes
            model, optimizer = accelerator.prepare(model, optimizer)
        steps = ScheduledSteps(accelerator, plan, optimizer)
        for batch in loader:
            with accelerator.accumulate(model):
                steps.begin()  # before the forward pass
                ...

    ``accelerator.save_state`` and ``load_state`` keep the step count and the plan. With several
    processes, a policy that changes during the training needs ``Accelerator(kwargs_handlers=[
    DistributedDataParallelKwargs(find_unused_parameters=True)])``. A plan that does not change
    needs neither this nor ``open``.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        plan: The plan.
        optimizers: The optimisers that ``accelerator.prepare`` returned.

    Raises:
        ScheduleError: ``accelerator`` cannot register objects for checkpoints.
    """

    def __init__(self, accelerator: Any, plan: TrainPlan, *optimizers: Any) -> None:
        if not hasattr(accelerator, "register_for_checkpointing"):
            raise ScheduleError(
                f"accelerator is a {type(accelerator).__name__}, expected accelerate.Accelerator, "
                "which saves the state of the plan in its checkpoints"
            )
        self.accelerator, self.plan = accelerator, plan
        self.count, self._begins_step = 0, True
        # accelerate wraps each optimiser in an object that has the original as `optimizer`.
        plan.bind(*(getattr(o, "optimizer", o) for o in optimizers))
        accelerator.register_for_checkpointing(self)

    def begin(self) -> None:
        """Apply the plan; call it inside ``accelerator.accumulate``, before the forward pass.

        Raises:
            ScheduleError: Several processes train and cannot follow the plan.
        """
        if self._begins_step:
            self.plan.step(self.count)
        self._begins_step = bool(self.accelerator.sync_gradients)  # True if this pass ends a step
        self.count += self._begins_step

    def state_dict(self) -> dict[str, Any]:
        """Return the state for accelerate's checkpoints."""
        return {"count": self.count, "fresh": self._begins_step, "plan": self.plan.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the step count and the plan."""
        self.plan.load_state_dict(state["plan"])
        self.count, self._begins_step = int(state["count"]), bool(state["fresh"])
