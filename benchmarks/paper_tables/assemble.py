"""A framework with its tower under a mask, ready to train."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import masks as found_masks
import norms
from frameworks import FRAMEWORKS, build
from plan import TRAINED_AT, Run
from torch import Tensor, nn


@dataclass(eq=False)
class Assembled:
    """A framework.

    Attributes:
        module: It.
        target: Its name among ovsprune's targets.
        tower: Names of the tower's parameters in ``holder``, without a pool that is not run.
        holder: What the target knows.
        zeros: Weights of the tower that its mask forbids; 0 where there is none.
        masks: Of the tower's parameters, by their names in ``holder``.
        idle: Names of the parameters of a pool that is not run.
    """

    module: Any
    target: str
    tower: frozenset[str]
    holder: nn.Module
    zeros: int
    masks: dict[str, Tensor]
    idle: frozenset[str] = frozenset()

    def check(self) -> None:
        """That what a mask has set to zero is zero still.

        Raises:
            RuntimeError: It is not.
        """
        own = dict(self.holder.named_parameters())
        for name, mask in self.masks.items():
            if own[name].detach()[~mask].any():
                raise RuntimeError(f"{name} has weights that its mask forbids")


def assemble(run: Run, classes: int, work: Path, sparsity: float = TRAINED_AT) -> Assembled:
    """The framework of a run, before its first step."""
    import ovsprune
    from ovsprune import backbones
    from ovsprune.targets import TARGETS, mask_tower

    backbone = FRAMEWORKS[run.framework].backbone
    place = found_masks.folder_of(work, backbone, sparsity)
    tower = backbones.load_backbone(str(found_masks.FOLDERS[backbone])).tower.float()
    tower.requires_grad_(True)
    module = build(run.framework, tower, classes, run.seed)
    holder = getattr(module, "holder", module)
    placed: dict[str, Tensor] = {}
    if run.mask == "structured":
        wanted = {n for n, p in holder.named_parameters() if p.requires_grad}
        ovsprune.transfer(holder, place / "structured", module.target, weights="slim")
        for name, parameter in holder.named_parameters():  # slim modules are new
            parameter.requires_grad_(name in wanted and parameter.is_floating_point())
    elif run.mask != "dense":
        applied = mask_tower(holder, _masks(run, backbone, place), module.target, hold=True)
        placed = dict(applied.masks)
        if module.frozen:
            norms.refresh(module.visual, work)
    parameters = dict(holder.named_parameters())
    names = TARGETS.get(module.target).tower_names(holder) & parameters.keys()
    pooled = FRAMEWORKS[run.framework].pooled
    idle = {name for name in names if not pooled and ".attnpool." in f".{name}"}
    zeros = sum(int((~m).sum()) for m in placed.values())
    return Assembled(
        module, module.target, frozenset(names - idle), holder, zeros, placed, frozenset(idle)
    )


def _masks(run: Run, backbone: str, place: Path) -> dict[str, Tensor]:
    from ovsprune.masks import read_masks

    if run.mask == "imp":
        return dict(read_masks(found_masks.imp_file(place)))
    record = json.loads((place / "masks.json").read_text())
    return found_masks.random_masks(found_masks.ranked(backbone), record["zeros"], run.seed)
