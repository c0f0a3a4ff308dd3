"""A slim checkpoint as a backbone: open_clip's tower with slim modules in place."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ovsprune.core.errors import CheckpointError
from ovsprune.core.protocols import Backbone
from ovsprune.slim import apply, load_open_clip, read

__all__ = ["load_slim"]


def load_slim(directory: Path) -> Backbone:
    """The backbone of a slim checkpoint, with its text tower if it was saved with one.

    Raises:
        CheckpointError: The checkpoint is damaged, or of a family that this version cannot build.
    """
    from ovsprune.backbones.open_clip_vit import assemble, build_clip

    checkpoint = read(directory)
    spec = checkpoint.spec
    if spec.family != "open_clip-vit":
        raise CheckpointError(
            f"{checkpoint.path} is of the family {spec.family!r}, which this version cannot build; "
            "it can still be read and applied (ovsprune.read, ovsprune.apply)"
        )
    with_text = bool(checkpoint.text())
    if with_text:
        model = load_open_clip(directory)[0]
    else:
        model = build_clip(spec.architecture)
        tower = model.visual
        assert isinstance(tower, nn.Module)
        apply(tower, checkpoint)
    backbone = assemble(
        spec.base.model,
        spec.base.pretrained,
        model.eval().requires_grad_(False),
        spec.architecture,
        spec.preprocess,
        trained=spec.base.trained,
    )
    backbone.slim = checkpoint
    if not with_text:
        backbone.encoder, backbone.text = None, {}
    return backbone
