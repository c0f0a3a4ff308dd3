"""Hooks in a command that ``ovsprune launch`` started: slim towers, and a schedule.

:mod:`ovsprune.launching.session` replaces the towers. This module adds the hook of the schedule to
known training loops when they start to train.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakSet

from torch import nn

from ovsprune.jobs.schedule import find_pool, schedule
from ovsprune.launching.session import Session, say
from ovsprune.launching.session import watched as towers_watched
from ovsprune.schedules import TrainPlan
from ovsprune.targets.hooks import Hook, Wrap, wrap_functions

__all__ = ["LOOPS", "Loop", "on_import", "watched"]

MakePlan = Callable[..., TrainPlan]
"""Function ``(model, *, total_steps)`` that makes the plan of a training."""


@dataclass(frozen=True)
class Loop:
    """Training loop of a library.

    Attributes:
        module: Full name of the module.
        name: Dotted name of a method in the module that is called before the training starts.
        hook: Module and class of the hook, below :mod:`ovsprune.schedules.loops`.
        add: Adds a hook to the loop.
    """

    module: str
    name: str
    hook: tuple[str, str]
    add: Callable[[Any, Any], object]

    def add_hook(self, trainer: Any, make_plan: MakePlan) -> None:
        """Add the hook, which makes its plan by ``make_plan``, to the loop ``trainer``."""
        module, name = self.hook
        hook = getattr(importlib.import_module(f"ovsprune.schedules.loops.{module}"), name)
        self.add(trainer, hook(make_plan))


LOOPS = (
    Loop(
        "detectron2.engine.train_loop",
        "TrainerBase.register_hooks",  # before train: resuming loads the states of hooks
        ("detectron2", "ScheduleHook"),
        lambda trainer, hook: trainer.register_hooks([hook]),
    ),
    Loop(
        "mmengine.runner.runner",
        "Runner.train",
        ("mmengine", "ScheduleHook"),
        lambda runner, hook: runner.register_hook(hook),
    ),
    Loop(
        "lightning.pytorch.trainer.trainer",
        "Trainer.fit",
        ("lightning", "ScheduleCallback"),
        lambda trainer, hook: trainer.callbacks.append(hook),
    ),
    Loop(
        "transformers.trainer",
        "Trainer.train",
        ("transformers", "ScheduleCallback"),
        lambda trainer, hook: trainer.add_callback(hook),
    ),
)
"""Known training loops. A new one needs an entry here and a file with its hook."""


def watched(settings: Mapping[str, Any] | None) -> list[str]:
    """Return the patterns of the modules in which functions are wrapped.

    ``settings`` are those of the schedule, None without one.
    """
    loops = () if settings is None else LOOPS
    return [*towers_watched(), *(loop.module for loop in loops)]


class _ScheduleHooks:
    """Hooks that add a schedule to the loops that train a model.

    ``settings`` are arguments of :func:`ovsprune.schedule`; ``write`` writes a record for the
    parent process.
    """

    def __init__(
        self, settings: Mapping[str, Any], write: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.settings, self.write = dict(settings), write
        self.hooked: WeakSet[Any] = WeakSet()  # loops that have the hook
        self.hooks = tuple(Hook(loop.module, loop.name, self._wrapper(loop)) for loop in LOOPS)

    def enable_gradients(self, model: nn.Module) -> None:
        """Enable gradients for the whole pool, so that the framework's optimiser includes it.

        Parameters that the plan does not control (``rest="keep"``) are not changed.
        """
        layers, _ = find_pool(model, self.settings["target"], self.settings["pool"])
        names = {layer.name for layer in layers}
        # followers are norms and biases that train with a layer
        if self.settings["rest"] != "keep":
            names |= {name for layer in layers for name in layer.followers}
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.requires_grad_(True)

    def _wrapper(self, loop: Loop) -> Wrap:
        """Return a function that wraps the method of a loop so that it adds the hook first."""

        def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(method)
            def add_hook_first(trainer: Any, *args: Any, **kwargs: Any) -> Any:
                if trainer not in self.hooked:  # register_hooks is called several times
                    self.hooked.add(trainer)
                    loop.add_hook(trainer, self.make_plan)
                return method(trainer, *args, **kwargs)

            return add_hook_first

        return wrap

    def make_plan(self, model: nn.Module, *, total_steps: int) -> TrainPlan:
        """Make the plan of a training, and record it."""
        plan = schedule(model, total_steps=total_steps, **self.settings)
        say(f"schedule: {plan!r}")
        names = {"trainable": list(plan.trainable), "frozen": list(plan.frozen)}
        self.write({"schedule": {"policy": plan.name, "total_steps": total_steps, **names}})
        return plan


@functools.cache
def _hooks(document: str) -> Sequence[Hook]:
    """Create the hooks of this process, once for the settings in ``document``."""
    settings = json.loads(document)
    session = Session(**settings["session"])
    if settings["schedule"] is None:
        return session.hooks
    schedule_hooks = _ScheduleHooks(settings["schedule"], session.write)
    session.on_attached = schedule_hooks.enable_gradients
    return (*session.hooks, *schedule_hooks.hooks)


def on_import(module: ModuleType, document: str) -> None:
    """Wrap the functions of a watched module after its import.

    ``document`` has the settings from the parent process (JSON), passed in the environment.
    """
    wrap_functions(_hooks(document), module)
