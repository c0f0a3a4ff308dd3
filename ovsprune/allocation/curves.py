"""Interpolation of measured error curves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["error_curve"]


def error_curve(ctx: AllocationContext, group: Group) -> NDArray[np.float64]:
    """Return the error at every width 0 ... units, [units + 1].

    Measured errors are made non-increasing and interpolated linearly in the logarithm.
    """
    assert ctx.curves is not None
    measured = ctx.curves.errors[group.name].numpy()
    # Measurement noise can make a narrower group look better: take the running maximum from
    # the widest to the narrowest.
    falling = np.maximum.accumulate(measured[::-1])[::-1]
    small = max(float(falling.max()) * 1e-6, 1e-12)
    widths = np.arange(group.units + 1)
    logs = np.interp(widths, ctx.curves.widths[group.name].numpy(), np.log(falling + small))
    return np.exp(logs) - small
