"""open_clip's ``TimmModel`` around a FastViT: the image towers of MobileCLIP and MobileCLIP 2.

Cut are the hidden channels of every block's MLP (``fc1``, activation, ``fc2``: 1x1 convolutions
behind a depthwise one) and the heads of the attention blocks of the last stages. The layer scales
behind both are folded into the layer before them, so that a refit is aimed at the residual stream.

The other blocks mix positions by depthwise convolutions in several branches (RepMixer, MobileOne).
They have no channels of their own and stay, in the form of training; ``reparameterize_model`` of
timm merges their branches in the slim tower as in the dense one. Stage widths, stem, downsampling,
positions, and the last convolution with its squeeze-and-excitation stay, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.backbones.open_clip_timm import pools_positions, timm_family
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, Slice, StreamPoint
from ovsprune.graph.scales import FoldedScale, fold_scale, unfold_scale
from ovsprune.slim.activation import find_activations
from ovsprune.slim.spec import ACTIVATIONS
from ovsprune.slim.timm_attention import TimmAttention, is_timm_attention
from ovsprune.slim.timm_tower import timm_outputs

__all__ = ["OpenClipFastVit"]

_SCALED = (
    ("layer_scale", "mlp", "fc2"),
    ("layer_scale_1", "token_mixer", "proj"),
    ("layer_scale_2", "mlp", "fc2"),
)
"""Names that a block may have for a layer scale, and where the layer before it is."""


@timm_family("open_clip-fastvit")
class OpenClipFastVit:
    """timm FastViT in open_clip: MLP units of every block, heads of the attention blocks."""

    modules = ("fastvit",)

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Whether it is a FastViT with a head, and not one that gives the features of its stages.

        The stage blocks must have an MLP, and where they attend, attention by timm's names.
        """
        from timm.models.fastvit import Attention, ConvMlp, FastVit

        if not (isinstance(trunk, FastVit) and pools_positions(vision)) or trunk.fork_feat:
            return False
        blocks = _mlp_blocks(nn.ModuleDict({"trunk": trunk})).values()
        known = find_activations(m for block in blocks for m in block.modules())
        return (
            all(type(block.mlp) is ConvMlp for block in blocks)
            and all(_attends(b) for b in blocks if isinstance(b.token_mixer, Attention))
            and len(known) == 1
            and known <= set(ACTIVATIONS)
        )

    def rewrite(self, tower: nn.Module) -> None:
        """Attention to separate linear maps; layer scales into the layer before them, in place."""
        for block in _mlp_blocks(tower).values():
            if _attends(block):
                block.token_mixer = TimmAttention(block.token_mixer, apart=True)
            for scale, part, own in _scales(block):
                gamma, owner = getattr(block, scale), getattr(block, part)
                if not isinstance(gamma, FoldedScale):
                    layer, place = fold_scale(getattr(owner, own), gamma.gamma)
                    setattr(owner, own, layer)
                    setattr(block, scale, place)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Layer scales out again; attention in timm's form, of its type where all heads stay."""
        from timm.models.fastvit import LayerScale2d

        kept = {g.consumer: g.columns[plan.kept[g.name]].flatten() for g in groups}
        for name, block in _mlp_blocks(tower).items():
            for scale, part, own in _scales(block):
                place, owner = getattr(block, scale), getattr(block, part)
                if isinstance(place, FoldedScale):
                    columns = kept.get(f"{name}.{part}.{own}")
                    layer, gamma = unfold_scale(getattr(owner, own), place, columns)
                    setattr(owner, own, layer)
                    bare = LayerScale2d(len(gamma), device="meta").train(place.training)
                    bare.gamma = gamma
                    setattr(block, scale, bare)
            if isinstance(block.token_mixer, TimmAttention):
                attention = block.token_mixer
                cut = len(attention.kept_heads) < attention.num_heads
                block.token_mixer = TimmAttention(attention) if cut else attention.whole()

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Heads and MLP units in order of the blocks; the last attention's heads are protected."""
        blocks = _mlp_blocks(tower)
        last = [name for name, block in blocks.items() if _attends(block)][-1:]
        seeds = []
        for name, block in blocks.items():
            if _attends(block):
                path = f"{name}.token_mixer"
                rows = torch.arange(block.token_mixer.num_heads).unsqueeze(1)
                reason = "frameworks read the last block's attention directly"
                seeds.append(
                    PrunableLayer(
                        path,
                        "heads",
                        f"{path}.q_proj",
                        block.token_mixer.head_dim,
                        name,
                        # matrices work on [B, h, w, C] inside attention
                        StreamPoint(f"{name}.mlp", "input", axis=1),
                        reason if name in last else None,
                        extra_slices=(Slice(f"{path}.heads", "out", rows),),
                    )
                )
            after = StreamPoint(name, "output")
            seeds.append(PrunableLayer(f"{name}.mlp", "mlp", f"{name}.mlp.fc1", 1, name, after))
        return seeds

    def stages(self, tower: nn.Module) -> Stages:
        """The stem; downsampling, positions and blocks; last convolution, pooling, projection."""
        trunk: Any = tower.get_submodule("trunk")

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            return timm_outputs(tower, trunk.final_conv(stream))

        return Stages(trunk.stem, _blocks(tower), head)


def _blocks(tower: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, stage in enumerate(tower.get_submodule("trunk.stages").children()):
        for name in ("downsample", "pos_emb"):
            part = stage.get_submodule(name)
            if not isinstance(part, nn.Identity):
                found[f"trunk.stages.{i}.{name}"] = part
        blocks: Any = stage.get_submodule("blocks")
        found |= {f"trunk.stages.{i}.blocks.{j}": block for j, block in enumerate(blocks)}
    return found


def _mlp_blocks(tower: nn.Module) -> dict[str, Any]:
    return {name: block for name, block in _blocks(tower).items() if hasattr(block, "mlp")}


def _attends(block: Any) -> bool:
    return is_timm_attention(block.token_mixer)


def _scales(block: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Those of the layer scales that a block has, folded or not."""
    for names in _SCALED:
        if hasattr(getattr(block, names[0], None), "gamma"):
            yield names
