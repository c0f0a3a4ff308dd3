"""Backbones from checkpoints: the library's dense model with slim modules or masked weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ovsprune.backbones.fitting import fit
from ovsprune.backbones.registry import FAMILIES
from ovsprune.core.errors import CheckpointError
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import DenseModel
from ovsprune.masks.directory import read_unstructured
from ovsprune.masks.spec import MaskedSpec
from ovsprune.slim import apply, read
from ovsprune.slim.spec import SlimSpec

__all__ = ["dense_of", "load_masked", "load_slim"]


def dense_of(path: Path, spec: SlimSpec | MaskedSpec, text: Mapping[str, Tensor]) -> Backbone:
    """Build the dense backbone of the checkpoint ``path``, with random weights in the tower.

    ``text`` contains the tensors of the text tower and may be empty.

    Raises:
        CheckpointError: This version cannot build the family.
        WeightsError: ``text`` does not fit the architecture.
    """
    if spec.family not in FAMILIES.names():
        raise CheckpointError(
            f"{path} is of the family {spec.family!r}, which this version cannot build; its "
            "tensors fit the base model's names, so it can still be read and applied "
            "(ovsprune.read, ovsprune.apply)"
        )
    return FAMILIES.get(spec.family).build(
        DenseModel(
            name=spec.base.model,
            architecture=spec.architecture,
            preprocess=spec.preprocess,
            pretrained=spec.base.pretrained,
            trained=spec.base.trained,
            text=text,
        )
    )


def load_slim(directory: Path) -> Backbone:
    """Load a slim checkpoint, with its text tower if the checkpoint contains one.

    Raises:
        CheckpointError: The checkpoint is damaged, or this version cannot build its family.
        WeightsError: Its text tower does not fit its architecture.
    """
    checkpoint = read(directory)
    backbone = dense_of(checkpoint.path, checkpoint.spec, checkpoint.text())
    # The random values of the dense tower are replaced here.
    apply(backbone.tower, checkpoint)
    backbone.tower.eval().requires_grad_(False)
    backbone.slim = checkpoint
    return backbone


def load_masked(directory: Path) -> Backbone:
    """Load an unstructured result, with its text tower if the result contains one.

    Raises:
        CheckpointError: The result is damaged, or this version cannot build its family.
        WeightsError: Its tensors do not fit its architecture.
    """
    checkpoint = read_unstructured(directory)
    spec = checkpoint.spec
    backbone = dense_of(checkpoint.path, spec, checkpoint.text())
    fit(spec.base.model, checkpoint.path, checkpoint.tower(), backbone.tower)
    backbone.slim = checkpoint
    return backbone
