"""Measured error by width, at every width."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["curve"]


def curve(ctx: AllocationContext, group: Group) -> NDArray[np.float64]:
    """Error [units + 1] at every width: measured, made falling, straight in the log between."""
    assert ctx.curves is not None
    measured = ctx.curves.errors[group.name].numpy()
    # Noise may let a narrower group look better; more units never harm.
    falling = np.maximum.accumulate(measured[::-1])[::-1]
    small = max(float(falling.max()) * 1e-6, 1e-12)
    at = np.arange(group.units + 1)
    logs = np.interp(at, ctx.curves.widths[group.name].numpy(), np.log(falling + small))
    return np.exp(logs) - small
