"""A framework's own tower, cut by a slim checkpoint's mask and repaired on pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt

import torch
from torch import Tensor

from ovsprune.backbones.built import dense_of
from ovsprune.calibration.fidelity import Fidelity
from ovsprune.core.clock import Clock
from ovsprune.core.errors import TargetError
from ovsprune.core.progress import Progress
from ovsprune.core.records import Plan
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.pipeline import Pipeline
from ovsprune.pruning.selection import Selection, SelectionContext
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.check import TOWER
from ovsprune.slim.vit import resize_positions

__all__ = ["refitted"]

_POSITIONS = "positional_embedding"


def refitted(
    checkpoint: SlimCheckpoint,
    state: Mapping[str, Tensor],
    *,
    calibration: str,
    samples: int | None,
    recovery: str,
    progress: Progress,
) -> tuple[SlimCheckpoint, Fidelity]:
    """``checkpoint`` with the framework's own weights in it, cut and repaired.

    The same job as a prune's, on the framework's dense tower, with the mask as the plan.

    Args:
        checkpoint: Whose mask says what goes.
        state: The framework's dense tower, by canonical name and shape.
        calibration: A folder of pictures without labels, or the name of a made kind.
        samples: Calibration pictures; None takes as many as :func:`ovsprune.prune`.
        recovery: As of :func:`ovsprune.prune`.
        progress: Is told how the work goes.

    Returns:
        The checkpoint, and how close its dense features are to the framework's own dense tower's,
        on pictures that the repair never saw.

    Raises:
        TargetError: The framework does not have the whole of the tower.
        OptionError: A value is out of its range.
        DataError: The pictures cannot be used.
    """
    spec = checkpoint.spec
    backbone = dense_of(checkpoint.path, spec, {})
    wanted = backbone.tower.state_dict()
    missing = sorted(
        name for name in wanted.keys() - state.keys() if not name.endswith("num_batches_tracked")
    )
    if missing:
        raise TargetError(
            f"the framework's tower has no {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}, so it cannot be run alone to be repaired; "
            "leave the calibration pictures out"
        )
    own = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    if _POSITIONS in own:
        own[_POSITIONS] = _native(own[_POSITIONS], wanted[_POSITIONS])
    backbone.tower.load_state_dict({**wanted, **own})
    settings = PruneConfig(
        ratio=1 - spec.slim.macs / spec.dense.macs,
        calibration=calibration,
        samples=samples,
        recovery=recovery,
    )
    settings.check()

    done = Pipeline(backbone, settings, progress, Clock(), _MaskSelector(checkpoint.mask)).run()
    tensors = {f"{TOWER}{name}": value for name, value in done.tower.state_dict().items()}
    return replace(checkpoint, tensors={**checkpoint.text(), **tensors}), done.fidelity


class _MaskSelector:
    """Selects the units that a slim checkpoint keeps."""

    def __init__(self, mask: Mapping[str, Tensor]) -> None:
        self.mask = mask

    def select(self, ctx: SelectionContext) -> Selection:
        kept = {g.name: self.mask.get(g.name, torch.arange(g.units)) for g in ctx.groups}
        return Selection(Plan(kept))


def _native(positions: Tensor, wanted: Tensor) -> Tensor:
    """Positions of a framework's grid on the grid of the base.

    Raises:
        TargetError: The grid is no square.
    """
    if positions.shape == wanted.shape:
        return positions
    sides = [isqrt(len(rows) - 1) for rows in (positions, wanted)]
    if any(side**2 != len(rows) - 1 for side, rows in zip(sides, (positions, wanted), strict=True)):
        raise TargetError(
            f"the framework's positions are {len(positions)} rows, those of a grid that is no "
            "square; leave the calibration pictures out"
        )
    return resize_positions(positions, (sides[0],) * 2, (sides[1],) * 2)
