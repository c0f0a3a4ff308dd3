"""Build the dense backbone that a checkpoint was made from, by the family in its spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ovsprune.backbones import FAMILIES
from ovsprune.core.errors import CheckpointError
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import DenseModel
from ovsprune.masks.spec import MaskedSpec
from ovsprune.slim.spec import SlimSpec

__all__ = ["dense_of"]


def dense_of(path: Path, spec: SlimSpec | MaskedSpec, text: Mapping[str, Tensor]) -> Backbone:
    """Build the backbone with random weights in its tower.

    Args:
        path: Of the checkpoint, for messages.
        spec: What its config says.
        text: Its text tower's tensors; may be empty.

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
