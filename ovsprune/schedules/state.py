"""State of a plan in checkpoints: alphas as plain JSON, and the check before a training resumes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ovsprune.core.errors import ScheduleError

__all__ = ["STATE_VERSION", "alphas_from_json", "alphas_to_json", "check_state"]

STATE_VERSION = 1
"""Version of the state that :meth:`ovsprune.schedules.TrainPlan.state_dict` returns."""


def check_state(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a saved state belongs to a plan with the given settings.

    Raises:
        ScheduleError: The version, a setting or the pool differs.
    """
    if state.get("version") != STATE_VERSION:
        raise ScheduleError(
            f"the state of a plan has version {state.get('version')!r}, expected {STATE_VERSION}"
        )
    for key, expected in settings.items():
        # A tuple becomes a list when the state is saved as JSON.
        saved = list(state[key]) if key == "layers" else state[key]
        if saved == expected:
            continue
        if key == "layers":
            difference = f"{len(saved)} layers in its pool, which differ from these {len(expected)}"
        else:
            difference = f"{key} {saved!r}, but this plan has {expected!r}"
        raise ScheduleError(
            f"the plan in the saved state has {difference}; make the plan with the same settings"
        )


def alphas_to_json(alphas: Mapping[str, float] | None) -> dict[str, float | None] | None:
    """Replace infinite alphas by None, because JSON has no infinity.

    An alpha is infinite if the layer is too narrow for a fit.
    """
    if alphas is None:
        return None
    return {name: alpha if math.isfinite(alpha) else None for name, alpha in alphas.items()}


def alphas_from_json(alphas: Mapping[str, float | None] | None) -> dict[str, float] | None:
    """Invert :func:`alphas_to_json`."""
    if alphas is None:
        return None
    return {name: math.inf if alpha is None else alpha for name, alpha in alphas.items()}
