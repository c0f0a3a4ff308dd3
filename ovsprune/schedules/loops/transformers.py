"""transformers: a callback for its ``Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ovsprune.schedules.loops import Following, Made

__all__ = ["ScheduleCallback"]

_KEY = "ovsprune_plan"


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]
    """Follows a plan in a Trainer: ``Trainer(..., callbacks=[ScheduleCallback(plan)])``.

    Args:
        plan: The plan, or a function that makes it (its length is the trainer's ``max_steps``).

    Attributes:
        following: Holds the ``plan``, once the training has begun.
    """

    def __init__(self, plan: Made) -> None:
        self.following = Following(plan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin, or go on."""
        kept = state.stateful_callbacks.get(_KEY) if state.global_step else None
        self.following.load_state_dict(kept)
        self.following.begin(given["model"], state.max_steps, given["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Follow the plan; the Trainer says so once for all passes of an optimiser step."""
        self.following.plan.step(state.global_step)
        # In trainer_state.json then, wherever the checkpoint goes.
        state.stateful_callbacks[_KEY] = self.following.state_dict()
