"""Batch norms of a tower whose weights were set to zero: statistics of what they read now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PICTURES = 256


def preprocess() -> Any:
    """Of the tower with batch norms."""
    from masks import FOLDERS

    from ovsprune import backbones

    return backbones.load_backbone(str(FOLDERS["resnet"])).preprocess


@torch.no_grad()
def refresh(tower: Any, work: Path) -> None:
    """Take the running statistics anew, without a label, on the pictures that masks were found on.

    A frozen tower would otherwise see its zeros through the dense tower's statistics, and a mask
    be judged by that. Towers without batch norms stay as they are.

    Args:
        tower: open_clip's image tower, for pictures of ``photo``'s size and colours.
        work: Of the tables; has ``calibration``.
    """
    norms = [m for m in tower.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if not norms:
        return
    from ovsprune.calibration.pictures import open_pictures

    pictures, _ = open_pictures(str(work / "calibration"), preprocess(), PICTURES, 0, 0)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    for images in pictures.batches(32):
        tower(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
