"""open_clip's ``TimmModel`` around a ConvNeXt (Liu et al., CVPR 2022).

The units are the hidden units of each block's MLP. The widths of the stages, the stem, the
downsampling layers between the stages, the norm of the head and the projection are not pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.layers import (
    has_one_activation,
    kept_columns,
    mlp_blocks,
    mlp_layer,
    stage_blocks,
)
from ovsprune.backbones.open_clip_timm import pools_positions, timm_family
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, StreamPoint
from ovsprune.graph.scales import FoldedScale, fold_scale, unfold_scale
from ovsprune.slim.timm_tower import timm_head_outputs

__all__ = ["OpenClipConvNext"]

_STAGES = "trunk.stages"


@timm_family("open_clip-convnext")
class OpenClipConvNext:
    """timm ConvNeXt in open_clip: MLP units of every block."""

    modules = ("convnext",)

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Return True for a ConvNeXt of the first version with a plain MLP in each block.

        The second version normalises over all units of a hidden layer (GRN), so the other units
        change when a unit is removed.
        """
        from timm.layers.mlp import Mlp
        from timm.models.convnext import ConvNeXt

        if not (isinstance(trunk, ConvNeXt) and pools_positions(vision)):
            return False
        blocks = _mlp_blocks(nn.ModuleDict({"trunk": trunk})).values()
        return all(type(b.mlp) is Mlp for b in blocks) and has_one_activation(trunk.modules())

    def rewrite(self, tower: nn.Module) -> None:
        """Fold each layer scale into the second layer of the MLP, in place."""
        # The output of that layer is then what the block adds to the residual stream, so that the
        # stream can be the target of a refit.
        for block in _mlp_blocks(tower).values():
            if block.gamma is not None:
                block.mlp.fc2, block.folded = fold_scale(block.mlp.fc2, block.gamma)
                block.gamma = None

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Separate the folded layer scales again."""
        kept = kept_columns(groups, plan)
        for name, block in _mlp_blocks(tower).items():
            place = getattr(block, "folded", None)
            if isinstance(place, FoldedScale):
                columns = kept.get(f"{name}.mlp.fc2")
                block.mlp.fc2, block.gamma = unfold_scale(block.mlp.fc2, place, columns)
                del block.folded

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return the MLP units of every block."""
        return [
            # The linear layers map [B, h, w, C] inside the block; the stream is [B, C, h, w].
            mlp_layer(name, block.mlp, StreamPoint(name, "output", axis=1))
            for name, block in _mlp_blocks(tower).items()
        ]

    def stages(self, tower: nn.Module) -> Stages:
        """Return stem; downsampling layers and blocks; norm, pooling and projection."""
        trunk: Any = tower.get_submodule("trunk")

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            return timm_head_outputs(tower, trunk.norm_pre(stream))  # stream [B, C, h, w]

        return Stages(trunk.stem, stage_blocks(tower, _STAGES), head)


def _mlp_blocks(tower: nn.Module) -> dict[str, Any]:
    return mlp_blocks(stage_blocks(tower, _STAGES))
