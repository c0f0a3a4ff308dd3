"""An unstructured result as a backbone: the dense model, with the masked weights in it."""

from __future__ import annotations

from pathlib import Path

from ovsprune.backbones.built import dense_of
from ovsprune.backbones.fitting import fit
from ovsprune.core.protocols import Backbone
from ovsprune.masks.directory import read_unstructured

__all__ = ["load_masked"]


def load_masked(directory: Path) -> Backbone:
    """The backbone of an unstructured result, with its text tower if it was saved with one.

    Raises:
        CheckpointError: It is damaged, or of a family that this version cannot build.
        WeightsError: Its tensors do not fit its architecture.
    """
    checkpoint = read_unstructured(directory)
    spec = checkpoint.spec
    backbone = dense_of(checkpoint.path, spec, checkpoint.text())
    fit(spec.base.model, checkpoint.path, checkpoint.tower(), backbone.tower)
    backbone.slim = checkpoint
    return backbone
