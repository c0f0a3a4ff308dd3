"""Help of `ovsprune prune`."""

from __future__ import annotations

from ovsprune.cli.prune import command
from ovsprune.core.distillation import Distillation


def test_help_shows_the_default_number_of_steps() -> None:
    (option,) = [p for p in command.params if p.name == "distill_steps"]
    assert f"{Distillation().limit}," in option.show_default  # type: ignore[attr-defined]
