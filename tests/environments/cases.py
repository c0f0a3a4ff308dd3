"""Models that are pruned here and attached in each environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """Dense model and the options of its prune.

    Attributes:
        vision: open_clip's ``vision_cfg``.
        quick_gelu: True for QuickGELU, false for GELU.
        options: Additional options of ``ovsprune.prune``.
    """

    vision: Mapping[str, Any]
    quick_gelu: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Return open_clip's model configuration, with a small text tower."""
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        config = {"embed_dim": 64, "vision_cfg": dict(self.vision), "text_cfg": text}
        return config | ({"quick_gelu": True} if self.quick_gelu else {})


SMALL = {
    "image_size": 64, "patch_size": 16, "layers": 3, "width": 64, "head_width": 16, "mlp_ratio": 2.0
}  # fmt: skip
BASE = {"image_size": 224, "patch_size": 16, "layers": 12, "width": 768, "head_width": 64}
LITE = {"image_size": 224, "timm_model_name": "efficientnet_lite0", "timm_proj": "linear"}

CASES = {
    "vit-small": Case(SMALL, quick_gelu=True),
    "ViT-B-16": Case(BASE, quick_gelu=True),
    "efficientnet_lite0": Case(LITE),
}
