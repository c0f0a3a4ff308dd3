"""A slim checkpoint as a backbone: the library's tower with slim modules in place."""

from __future__ import annotations

from pathlib import Path

from ovsprune.backbones.built import dense_of
from ovsprune.core.protocols import Backbone
from ovsprune.slim import apply, read

__all__ = ["load_slim"]


def load_slim(directory: Path) -> Backbone:
    """The backbone of a slim checkpoint, with its text tower if it was saved with one.

    Raises:
        CheckpointError: The checkpoint is damaged, or of a family that this version cannot build.
        WeightsError: Its text tower does not fit its architecture.
    """
    checkpoint = read(directory)
    backbone = dense_of(checkpoint.path, checkpoint.spec, checkpoint.text())
    apply(backbone.tower, checkpoint)
    backbone.tower.eval().requires_grad_(False)
    backbone.slim = checkpoint
    return backbone
