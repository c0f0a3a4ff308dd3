"""Hook for the mmengine runner."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict

from ovsprune.schedules.loops import PlanFollower, PlanOrFactory

__all__ = ["ScheduleHook"]

_KEY = "ovsprune_plan"


class ScheduleHook(Hook):  # type: ignore[misc]
    """Runs a plan in an mmengine runner: ``runner.register_hook(ScheduleHook(plan))``.

    With several processes, a plan that may change during the training must be open when the runner
    wraps the model: make the hook before the runner, and set ``find_unused_parameters=True`` in the
    configuration.

    Args:
        plan: The plan, or a function that makes it. Its length is the runner's ``max_iters``
            divided by the gradient accumulation of the optimiser wrapper.

    Attributes:
        follower: Holds the ``plan`` once the training has begun.
    """

    priority = "ABOVE_NORMAL"  # before hooks of the default priority

    def __init__(self, plan: PlanOrFactory) -> None:
        self.follower, self._accumulation = PlanFollower(plan), 1

    def before_train(self, runner: Any) -> None:
        """Begin or resume the plan; a run from weights alone (``load_from``) begins a new one."""
        if not runner.iter:  # not resumed
            self.follower.load_state_dict(None)
        wrapper = runner.optim_wrapper
        wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        self._accumulation = max(getattr(w, "_accumulative_counts", 1) for w in wrappers)
        # Rounded up: mmengine takes a step after the last iteration, too.
        steps = -(-runner.max_iters // self._accumulation)
        self.follower.begin(runner.model, steps, *(w.optimizer for w in wrappers))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Apply the plan if this iteration begins an optimiser step."""
        if runner.iter % self._accumulation == 0:
            self.follower.plan.step(runner.iter // self._accumulation)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the plan's state into mmengine's checkpoint."""
        checkpoint[_KEY] = self.follower.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Load the plan's state; checkpoints of trainings without a plan have none."""
        self.follower.load_state_dict(checkpoint.get(_KEY))
