"""The options of `ovsprune prune` say the defaults that the job has."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ovsprune.cli.prune import command
from ovsprune.core.protocols import Distillation
from ovsprune.jobs.settings import Settings

DEFAULTS = {f"distill_{f.name}": getattr(Distillation(), f.name) for f in fields(Distillation)}
DEFAULTS["rounds"] = Settings(ratio=0.5).rounds


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_agree(name: str) -> None:
    given = command.make_context("prune", ["--model", "tiny", "--ratio", "0.5"])
    assert given.params[name] == DEFAULTS[name]


def test_the_help_says_how_many_steps_are_taken() -> None:
    (option,) = [p for p in command.params if p.name == "distill_steps"]
    assert f"{Distillation().limit} by default" in option.help  # type: ignore[attr-defined]
