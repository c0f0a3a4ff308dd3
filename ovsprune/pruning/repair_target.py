"""Repair of a framework's own tower after it was cut by the mask of a slim checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt

import torch
from torch import Tensor

from ovsprune.backbones.checkpoints import dense_of
from ovsprune.calibration.fidelity import Fidelity
from ovsprune.core.clock import Clock
from ovsprune.core.errors import OptionError, TargetError
from ovsprune.core.progress import Progress
from ovsprune.core.records import Plan
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.pipeline import Pipeline
from ovsprune.pruning.selection import Selection, SelectionContext
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.check import TOWER
from ovsprune.slim.vit import resize_positions
from ovsprune.targets.check import Weights

__all__ = ["TowerRepair", "repair_tower"]

_POSITIONS = "positional_embedding"


@dataclass(frozen=True)
class TowerRepair:
    """Repair of a framework's own tower after it was cut.

    Attributes:
        calibration: Folder of unlabelled images, or the name of a synthetic kind.
        samples: Number of calibration images; None uses the default of :func:`ovsprune.prune`.
        recovery: Name of the recovery method.
    """

    calibration: str
    samples: int | None
    recovery: str

    def __call__(
        self,
        slim: SlimCheckpoint,
        choice: tuple[Weights, str],
        state: Mapping[str, Tensor],
        progress: Progress,
    ) -> tuple[SlimCheckpoint, str]:
        """Return the checkpoint with the framework's repaired weights, and the extended reason.

        Args:
            slim: The slim checkpoint.
            choice: Weights that would be used without a repair, and the reason.
            state: The framework's dense tower, by canonical name.
            progress: Progress reporter.

        Raises:
            OptionError: The slim weights would be used, or a value is out of its range.
            TargetError: The framework does not have the complete tower.
            DataError: The images cannot be used.
        """
        if choice[0] != "target":
            raise OptionError(
                "calibration images repair the framework's own weights, but the slim weights would "
                f"be used ({choice[1]}), which are repaired already; leave out calibration, or set "
                "weights to 'target'"
            )
        repaired, fidelity = repair_tower(
            slim,
            state,
            calibration=self.calibration,
            samples=self.samples,
            recovery=self.recovery,
            progress=progress,
        )
        return repaired, (
            f"{choice[1]}; repaired by {self.recovery} on images of {self.calibration}: relative "
            f"error {fidelity.relative_error:.3f} on held-out images"
        )


def repair_tower(
    checkpoint: SlimCheckpoint,
    state: Mapping[str, Tensor],
    *,
    calibration: str,
    samples: int | None,
    recovery: str,
    progress: Progress,
) -> tuple[SlimCheckpoint, Fidelity]:
    """Cut the framework's own tower by the mask of ``checkpoint``, and repair it.

    Runs the pipeline of :func:`ovsprune.prune` on the framework's dense tower, with the mask as
    the plan.

    Args:
        checkpoint: Slim checkpoint, for its mask.
        state: The framework's dense tower, by canonical name and shape.
        calibration: Folder of unlabelled images, or the name of a synthetic kind.
        samples: Number of calibration images; None uses the default of :func:`ovsprune.prune`.
        recovery: Name of the recovery method, as for :func:`ovsprune.prune`.
        progress: Progress reporter.

    Returns:
        The checkpoint with the repaired weights, and the fidelity of its features to those of the
        framework's dense tower on images that the repair did not use.

    Raises:
        TargetError: The framework does not have the complete tower.
        OptionError: A value is out of its range.
        DataError: The images cannot be used.
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
            f"{', ...' if len(missing) > 3 else ''}, so it cannot be run alone for the repair; "
            "leave out calibration"
        )
    dense = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    if _POSITIONS in dense:
        dense[_POSITIONS] = _native(dense[_POSITIONS], wanted[_POSITIONS])
    backbone.tower.load_state_dict({**wanted, **dense})
    config = PruneConfig(
        ratio=1 - spec.slim.macs / spec.dense.macs,
        calibration=calibration,
        samples=samples,
        recovery=recovery,
    )
    config.check()

    selector = _MaskSelector(checkpoint.mask)
    result = Pipeline(backbone, config, progress, Clock(), selector).run()
    tensors = {f"{TOWER}{name}": value for name, value in result.tower.state_dict().items()}
    return replace(checkpoint, tensors={**checkpoint.text(), **tensors}), result.fidelity


class _MaskSelector:
    """Selects the units that a mask keeps; groups that it does not name keep all units."""

    def __init__(self, mask: Mapping[str, Tensor]) -> None:
        self.mask = mask

    def select(self, ctx: SelectionContext) -> Selection:
        kept = {g.name: self.mask.get(g.name, torch.arange(g.units)) for g in ctx.groups}
        return Selection(Plan(kept))


def _native(positions: Tensor, wanted: Tensor) -> Tensor:
    """Resize the positions of a framework to the grid of the base model.

    Args:
        positions: Positions of the framework [1 + h * w, E].
        wanted: Positions of the base model [1 + H * W, E].

    Raises:
        TargetError: A grid is not square.
    """
    if positions.shape == wanted.shape:
        return positions
    sides = [isqrt(len(rows) - 1) for rows in (positions, wanted)]
    if any(side**2 != len(rows) - 1 for side, rows in zip(sides, (positions, wanted), strict=True)):
        raise TargetError(
            f"the framework has {len(positions)} positions, expected a square number plus one; "
            "leave out calibration"
        )
    return resize_positions(positions, (sides[0],) * 2, (sides[1],) * 2)
