"""The frameworks, one a file, with the same verbs.

``build(tower, classes, seed)`` gives a module with the dense ``tower`` (open_clip's own) in it:

- ``loss(images, labels, text)``: a scalar; images normalised [B, 3, H, W], labels [B, H, W] with
  -1 for void, text [K, 512] of unit length: the classifier is the text, so that classes which
  were never trained can be scored;
- ``predict(images, text)``: class scores [B, K, h, w];
- ``target``: who of ovsprune's targets puts a slim tower into it, or into its ``holder``, where
  it has one;
- ``frozen``: whether its tower stays as it comes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FRAMEWORKS", "Framework", "build"]


@dataclass(frozen=True)
class Framework:
    """What the tables say of a framework.

    Attributes:
        module: Its file.
        backbone: ``"vit"`` or ``"resnet"``.
        title: On the page.
        paper: Its row in the paper's table; None where the paper has no such framework.
        pooled: Whether it runs the tower's attention pool, or a part of it.
    """

    module: str
    backbone: str
    title: str
    paper: str | None
    pooled: bool = True


FRAMEWORKS: Mapping[str, Framework] = {
    "san": Framework("san", "vit", "SAN (mmsegmentation's)", None),
    "mask2former": Framework("mask2former", "resnet", "Mask2Former (transformers')", "Han et al."),
    "deeplabv3": Framework(
        "deeplabv3", "resnet", "DeepLabV3 (torchvision's)", "DeepLabV3", pooled=False
    ),
    "fc-clip": Framework("fc_clip", "resnet", "FC-CLIP's mask pooling, tower frozen", "FC-CLIP"),
}


def build(name: str, tower: Any, classes: int, seed: int) -> Any:
    """The framework called ``name`` around a dense tower."""
    module = importlib.import_module(f"frameworks.{FRAMEWORKS[name].module}")
    return module.build(tower, classes, seed)
