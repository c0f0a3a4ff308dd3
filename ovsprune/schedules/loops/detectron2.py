"""detectron2: a hook for its trainers."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase

from ovsprune.schedules.loops import Made, plan_for

__all__ = ["ScheduleHook"]


class ScheduleHook(HookBase):  # type: ignore[misc]
    """Follows a plan in a detectron2 trainer: ``trainer.register_hooks([ScheduleHook(plan)])``.

    Args:
        plan: The plan, or a function that makes it (its length is the trainer's ``max_iter``).

    Attributes:
        plan: The plan, once the training has begun.
    """

    def __init__(self, plan: Made) -> None:
        self._made = plan
        self._state: dict[str, Any] | None = None
        self.plan: Any = None

    def before_train(self) -> None:
        """Make the plan, bind the optimiser, and go on where a resumed training was."""
        trainer: Any = self.trainer
        inner = getattr(trainer, "_trainer", trainer)  # DefaultTrainer holds the one that runs
        self.plan = plan_for(self._made, inner.model, trainer.max_iter)
        if self._state is not None:
            self.plan.load_state_dict(self._state)
        self.plan.bind(inner.optimizer)

    def before_step(self) -> None:
        """Follow the plan."""
        self.plan.step(self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        """What detectron2 writes into its checkpoints."""
        return {} if self.plan is None else dict(self.plan.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What it gives back before the training begins."""
        self._state = state or None
