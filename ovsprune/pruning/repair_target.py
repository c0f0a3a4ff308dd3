"""Repair of a framework's own tower after it was cut by the mask of a slim checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt

import torch
from torch import Tensor, nn

from ovsprune.backbones.checkpoints import dense_of
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
from ovsprune.targets.layout import POSITIONS

__all__ = ["TowerRepair"]

_COUNTERS = "num_batches_tracked"  # some norms of frameworks lack it; no forward pass reads it


@dataclass(frozen=True)
class TowerRepair:
    """Repair of a framework's own tower after it was cut.

    Attributes:
        calibration: Folder of unlabelled images, or the name of a synthetic kind.
        samples: Number of calibration images; None uses the default of :func:`ovsprune.prune`.
        recovery: Name of the recovery method, as for :func:`ovsprune.prune`.
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

        Runs the pipeline of :func:`ovsprune.prune` on the framework's dense tower, with the mask of
        the slim checkpoint as the plan.

        Args:
            slim: The slim checkpoint, for its mask.
            choice: Weights that would be used without a repair, and the reason.
            state: The framework's dense tower, by canonical name and shape.
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
        # the base's architecture, filled with the framework's weights
        backbone = dense_of(slim.path, slim.spec, {})
        _load_tower(backbone.tower, state)
        # the ratio describes the mask; nothing is selected by it
        config = PruneConfig(
            ratio=1 - slim.spec.slim.macs / slim.spec.dense.macs,
            calibration=self.calibration,
            samples=self.samples,
            recovery=self.recovery,
        )
        config.check()
        result = Pipeline(backbone, config, progress, Clock(), _MaskSelector(slim.mask)).run()
        tensors = {f"{TOWER}{name}": value for name, value in result.tower.state_dict().items()}
        return replace(slim, tensors={**slim.text(), **tensors}), (
            f"{choice[1]}; repaired by {self.recovery} on images of {self.calibration}: relative "
            f"error {result.fidelity.relative_error:.3f} on held-out images"
        )


def _load_tower(tower: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the framework's dense tower, in float32; raise TargetError if it is incomplete."""
    base = tower.state_dict()
    missing = [name for name in base if name not in state and not name.endswith(_COUNTERS)]
    if missing:
        raise TargetError(
            f"the framework's tower has no {', '.join(sorted(missing)[:3])}"
            f"{', ...' if len(missing) > 3 else ''}, so it cannot be run alone for the repair; "
            "leave out calibration"
        )
    dense = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    if POSITIONS in dense:
        dense[POSITIONS] = _native(dense[POSITIONS], base[POSITIONS])
    # `base` supplies the counters that a framework may lack.
    tower.load_state_dict({**base, **dense})


class _MaskSelector:
    """Selector of the units that a mask keeps; groups that it does not name keep all units."""

    def __init__(self, mask: Mapping[str, Tensor]) -> None:
        self.mask = mask

    def select(self, ctx: SelectionContext) -> Selection:
        kept = {g.name: self.mask.get(g.name, torch.arange(g.units)) for g in ctx.groups}
        return Selection(Plan(kept))


def _native(positions: Tensor, base: Tensor) -> Tensor:
    """Resize the framework's positions [1 + h * h, E] to the base's grid [1 + H * H, E]."""
    if positions.shape == base.shape:
        return positions
    # Row 0 is the position of the class token; the other rows are a square grid of patches.
    sides = [isqrt(len(rows) - 1) for rows in (positions, base)]
    if any(side**2 != len(rows) - 1 for side, rows in zip(sides, (positions, base), strict=True)):
        raise TargetError(
            f"the framework has {len(positions)} positions, expected a square number plus one; "
            "leave out calibration"
        )
    return resize_positions(positions, (sides[0],) * 2, (sides[1],) * 2)
