"""open_clip's ``TimmModel`` around a ConvNeXt.

Cut are the hidden units of every block's MLP. The layer scale behind the MLP is folded into its
second layer, so that a refit is aimed at the residual stream. The widths of the stages, the stem,
the downsampling layers between the stages, the norm of the head and the projection stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.open_clip_timm import pools_positions, timm_family
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, StreamPoint
from ovsprune.graph.scales import FoldedScale, fold_scale, unfold_scale
from ovsprune.slim.activation import find_activations
from ovsprune.slim.spec import ACTIVATIONS
from ovsprune.slim.timm_tower import timm_outputs

__all__ = ["OpenClipConvNext"]


@timm_family("open_clip-convnext")
class OpenClipConvNext:
    """timm ConvNeXt in open_clip: MLP units of every block."""

    modules = ("convnext",)

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Whether it is a ConvNeXt of the first version.

        The second has a norm over all units of a hidden layer (GRN), in which a unit that is cut is
        missed by the others.
        """
        from timm.layers.mlp import Mlp
        from timm.models.convnext import ConvNeXt

        if not (isinstance(trunk, ConvNeXt) and pools_positions(vision)):
            return False
        blocks = _mlp_blocks(nn.ModuleDict({"trunk": trunk})).values()
        known = find_activations(trunk.modules())
        plain = all(type(block.mlp) is Mlp for block in blocks)
        return plain and len(known) == 1 and known <= set(ACTIVATIONS)

    def rewrite(self, tower: nn.Module) -> None:
        """The layer scale of every block into the second layer of its MLP, in place."""
        for block in _mlp_blocks(tower).values():
            if block.gamma is not None:
                block.mlp.fc2, block.folded = fold_scale(block.mlp.fc2, block.gamma)
                block.gamma = None

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """The folded layer scales out again."""
        kept = {g.consumer: g.columns[plan.kept[g.name]].flatten() for g in groups}
        for name, block in _mlp_blocks(tower).items():
            place = getattr(block, "folded", None)
            if isinstance(place, FoldedScale):
                columns = kept.get(f"{name}.mlp.fc2")
                block.mlp.fc2, block.gamma = unfold_scale(block.mlp.fc2, place, columns)
                del block.folded

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """The MLP units of every block."""
        return [
            # matrices work on [B, h, w, C] inside the block, and the stream is [B, C, h, w]
            PrunableLayer(f"{n}.mlp", "mlp", f"{n}.mlp.fc1", 1, n, StreamPoint(n, "output", axis=1))
            for n in _mlp_blocks(tower)
        ]

    def stages(self, tower: nn.Module) -> Stages:
        """The stem; downsampling layers and blocks; norms, pooling and projection."""
        trunk: Any = tower.get_submodule("trunk")

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            return timm_outputs(tower, trunk.norm_pre(stream))

        return Stages(trunk.stem, _blocks(tower), head)


def _blocks(tower: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, stage in enumerate(tower.get_submodule("trunk.stages").children()):
        if not isinstance(stage.downsample, nn.Identity):
            found[f"trunk.stages.{i}.downsample"] = stage.downsample
        blocks: Any = stage.blocks
        found |= {f"trunk.stages.{i}.blocks.{j}": block for j, block in enumerate(blocks)}
    return found


def _mlp_blocks(tower: nn.Module) -> dict[str, Any]:
    return {name: block for name, block in _blocks(tower).items() if hasattr(block, "mlp")}
