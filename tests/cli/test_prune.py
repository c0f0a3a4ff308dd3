"""What the help of `ovsprune prune` says of the job."""

from __future__ import annotations

from ovsprune.cli.prune import command
from ovsprune.core.distillation import Distillation


def test_the_help_says_how_many_steps_are_taken() -> None:
    (option,) = [p for p in command.params if p.name == "distill_steps"]
    assert f"{Distillation().limit}," in option.show_default  # type: ignore[attr-defined]
