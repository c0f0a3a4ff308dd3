"""Callback for the transformers ``Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ovsprune.schedules.loops import PlanFollower, PlanOrFactory

__all__ = ["ScheduleCallback"]

_KEY = "ovsprune_plan"


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]
    """Runs a plan in a Trainer: ``Trainer(..., callbacks=[ScheduleCallback(plan)])``.

    Args:
        plan: The plan, or a function that makes it from the trainer's ``max_steps``.

    Attributes:
        follower: Holds the ``plan`` once the training has begun.
    """

    def __init__(self, plan: PlanOrFactory) -> None:
        self.follower = PlanFollower(plan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin or resume the plan."""
        saved = state.stateful_callbacks.get(_KEY) if state.global_step else None
        self.follower.load_state_dict(saved)
        self.follower.begin(kwargs["model"], state.max_steps, kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Apply the plan; the Trainer calls this once per optimiser step, not once per pass."""
        self.follower.plan.step(state.global_step)
        # The Trainer writes this to trainer_state.json in every checkpoint.
        state.stateful_callbacks[_KEY] = self.follower.state_dict()
