"""Requirements of SAN that both of its implementations (detectron2, mmengine) share."""

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
    "residual width": "the side adapter's fusion layers read the residual stream after four blocks",
    "projection": "mask embeddings are compared with text embeddings of the dense width",
    "depth": "features are read at fixed depths, and the blocks are split at a fixed depth",
}


def no_cross_attention(path: str, supported_in: str = "") -> Check:
    """Build a check that refuses removed heads if SAN's cross attention needs all of them.

    With ``cross_attn`` on, SAN slices ``in_proj_weight`` at offsets of the dense width.

    Args:
        path: Path of the module with the attribute ``cross_attn``.
        supported_in: Python module of the framework whose classes are accepted, because a hook
            (:mod:`ovsprune.targets.san_compat`) makes their cross attention take fewer heads.
    """

    def check(model: nn.Module, checkpoint: SlimCheckpoint, layout: Layout) -> None:
        head = model.get_submodule(path)
        if not getattr(head, "cross_attn", False) or type(head).__module__ == supported_in:
            return
        cut = [
            layer.name
            for layer in checkpoint.spec.layers
            # Only attention below this head takes part; the blocks before it run unchanged.
            if layer.kind == "heads" and layer.kept < layer.units
            if (layout.name(layer.name) or "").startswith(f"{path}.")
        ]
        if cut:
            raise TargetError(
                f"{path} has cross_attn on and slices attention weights of the dense width, but "
                f"the slim checkpoint removes heads of {', '.join(cut)}; turn cross_attn off (the "
                "default), or prune again with these layers protected (--protect)"
            )

    return check
