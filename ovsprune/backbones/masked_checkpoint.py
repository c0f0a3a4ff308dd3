"""An unstructured result as a backbone: the dense model, with the masked weights in it."""

from __future__ import annotations

from pathlib import Path

from ovsprune.backbones.pretrained import fit
from ovsprune.core.errors import CheckpointError
from ovsprune.core.protocols import Backbone
from ovsprune.masks.directory import read_unstructured
from ovsprune.slim.check import TOWER

__all__ = ["load_masked"]


def load_masked(directory: Path) -> Backbone:
    """The backbone of an unstructured result, with its text tower if it was saved with one.

    Raises:
        CheckpointError: It is damaged, or of a family that this version cannot build.
        WeightsError: Its tensors do not fit its architecture.
    """
    from ovsprune.backbones.open_clip_vit import assemble, build_clip

    checkpoint = read_unstructured(directory)
    spec = checkpoint.spec
    if spec.family != "open_clip-vit":
        raise CheckpointError(
            f"{checkpoint.path} is of the family {spec.family!r}, which this version cannot build; "
            "its model.safetensors loads wherever the base model's weights do"
        )
    model = build_clip(spec.architecture)
    text = checkpoint.text()
    own = {} if text else {k: v for k, v in model.state_dict().items() if not k.startswith(TOWER)}
    fit(spec.base.model, checkpoint.path, {**own, **checkpoint.tensors}, model)
    backbone = assemble(
        spec.base.model,
        spec.base.pretrained,
        model,
        spec.architecture,
        spec.preprocess,
        trained=spec.base.trained,
    )
    backbone.slim = checkpoint
    if not text:
        backbone.encoder, backbone.text = None, {}
    return backbone
