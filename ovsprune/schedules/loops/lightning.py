"""Lightning: a callback for its trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from ovsprune.schedules.loops import Made, plan_for

__all__ = ["ScheduleCallback"]


class ScheduleCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Follows a plan in a Lightning trainer: ``Trainer(callbacks=[ScheduleCallback(plan)])``.

    Args:
        plan: The plan, or a function that makes it, of the LightningModule (its length is the
            trainer's estimate of its steps).

    Attributes:
        plan: The plan, once the training has begun.
    """

    def __init__(self, plan: Made) -> None:
        self._made = plan
        self._state: dict[str, Any] | None = None
        self.plan: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the plan, bind the optimisers, and go on where a resumed training was."""
        steps = trainer.estimated_stepping_batches
        self.plan = plan_for(self._made, pl_module, max(1, int(steps)))
        if self._state is not None:
            self.plan.load_state_dict(self._state)
        self.plan.bind(*trainer.optimizers)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the plan, when an optimiser step begins."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.plan.step(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes into its checkpoints."""
        return {} if self.plan is None else dict(self.plan.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What it gives back, before or after the plan is made."""
        self._state = state_dict or None
        if self.plan is not None and self._state is not None:
            self.plan.load_state_dict(self._state)
