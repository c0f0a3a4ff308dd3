"""What SAN asks of a slim tower, in each of the frameworks that have it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.targets.framework import Check
from ovsprune.targets.layout import POSITIONS, Layout

__all__ = ["PROTECTS", "STAYS", "no_cross_attention"]

STAYS: Mapping[str, str] = {POSITIONS: "the framework resizes and trains its positions"}

PROTECTS: Mapping[str, str] = {
    POSITIONS: "the framework resizes and trains its positions, so its own are kept",
    "residual width": "the side adapter's fusion layers read the stream of four blocks",
    "projection": "mask embeddings are compared with text embeddings of the dense width",
    "depth": "features are read and blocks are split at fixed depths",
}


def no_cross_attention(path: str, served: str = "") -> Check:
    """Refuse cut heads where SAN slices ``in_proj_weight`` at offsets of the dense width itself.

    Args:
        path: Of the module whose ``cross_attn`` says so.
        served: Name of the framework's module in which a hook of ours serves cut heads, too.
    """

    def check(model: nn.Module, checkpoint: SlimCheckpoint, layout: Layout) -> None:
        head = model.get_submodule(path)
        if not getattr(head, "cross_attn", False) or type(head).__module__ == served:
            return
        cut = [
            layer.name
            for layer in checkpoint.spec.layers
            if layer.kind == "heads" and layer.kept < layer.units
            if (layout.name(layer.name) or "").startswith(f"{path}.")
        ]
        if cut:
            raise TargetError(
                f"{path} has cross_attn on, which slices the dense attention weights itself, but "
                f"the slim checkpoint cuts heads of {', '.join(cut)}; turn cross_attn off (the "
                "default), or prune again with those layers protected (--protect)"
            )

    return check
