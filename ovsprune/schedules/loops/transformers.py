"""transformers: a callback for its ``Trainer``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ovsprune.core.files import write_text
from ovsprune.schedules.loops import Following, Made

__all__ = ["ScheduleCallback"]

_FILE = "ovsprune_plan.json"


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
        file = _file(args, state)
        if state.global_step and file.is_file():
            self.following.load_state_dict(json.loads(file.read_text(encoding="utf-8")))
        self.following.begin(given["model"], state.max_steps, given["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Follow the plan; the Trainer says so once for all passes of an optimiser step."""
        self.following.plan.step(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Put the plan's state beside the checkpoint that was just written."""
        if state.is_world_process_zero:
            write_text(_file(args, state), json.dumps(self.following.state_dict()))


def _file(args: Any, state: Any) -> Path:
    return Path(os.fspath(args.output_dir)) / f"checkpoint-{state.global_step}" / _FILE
