"""open_clip's VisionTransformer, and the CLIP around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones import FAMILIES, open_clip_own
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.backbones.open_clip_own import load_own, rebuild_own
from ovsprune.backbones.open_clip_source import TINY, config_of
from ovsprune.core.protocols import Backbone, PrunableLayer, Stages
from ovsprune.core.records import DenseModel, Group, Plan, Preprocess, StreamPoint
from ovsprune.graph.attention import SeparateAttention
from ovsprune.slim import SlimAttention
from ovsprune.slim.pooling import each_alone

__all__ = ["OpenClipVit", "assemble", "build_clip"]


@FAMILIES.register("open_clip-vit")
class OpenClipVit:
    """open_clip VisionTransformer: heads and MLP units of every block."""

    library = "open_clip_torch"

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether open_clip builds a plain VisionTransformer from ``config``."""
        return _is_plain_vit(config)

    def names(self) -> Sequence[str]:
        """``tiny`` and every VisionTransformer of open_clip's own."""
        return _names()

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Build the CLIP called ``name`` and load its weights.

        See :func:`ovsprune.backbones.open_clip_source.open_source`. A text tower that lives on a
        hub is not built; its state is passed on where the file has it.

        Raises:
            WeightsError: The weights cannot be had or do not fit.
            OptionError: ``activation`` is unknown, or contradicts the tag's own.
        """
        return _plain(load_own("open_clip-vit", name, pretrained, activation))

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense CLIP, its image tower with random weights; see the protocol."""
        return _plain(rebuild_own("open_clip-vit", dense))

    def rewrite(self, tower: nn.Module) -> None:
        """Attention of every block, slim or not, to separate linear maps, in place."""
        for block in _blocks(tower).values():
            if isinstance(block.attn, (nn.MultiheadAttention, SlimAttention)):
                block.attn = SeparateAttention(block.attn)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Rewritten attention to slim attention, or to torch's own where all heads stay whole."""
        for name, block in _blocks(tower).items():
            if isinstance(block.attn, SeparateAttention):
                block.attn = block.attn.finished(plan.kept.get(f"{name}.attn"))

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Heads and MLP units of every block; the last block's heads are protected."""
        blocks = _blocks(tower)
        last = list(blocks)[-1]
        seeds = []
        for name, block in blocks.items():
            scaled = not isinstance(block.ls_1, nn.Identity)
            middle = None if scaled else StreamPoint(f"{name}.ln_2", "input")
            after = None if scaled else StreamPoint(name, "output")
            reason = "frameworks read the last block's attention directly" if name == last else None
            width = block.attn.head_dim
            query = f"{name}.attn.q_proj"
            seeds.append(PrunableLayer(f"{name}.attn", "heads", query, width, name, middle, reason))
            seeds.append(PrunableLayer(f"{name}.mlp", "mlp", f"{name}.mlp.c_fc", 1, name, after))
        return seeds

    def stages(self, tower: nn.Module) -> Stages:
        """Patches and positions; the residual blocks; pooling and projection.

        Dense is what the pooled output would be of a picture of that patch alone: ``ln_post`` and
        ``proj`` of the token; where attention pools, first the values that it reads there.
        """
        vit: Any = tower

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            pooled, tokens = vit._pool(stream)
            if vit.attn_pool is not None:
                tokens = vit.ln_post(each_alone(vit.attn_pool, stream[:, 1:]))
            elif vit.final_ln_after_pool:
                tokens = vit.ln_post(tokens)
            height, width = vit.grid_size
            dense = (tokens @ vit.proj).transpose(1, 2).unflatten(2, (height, width))
            return pooled @ vit.proj, dense

        return Stages(vit._embeds, _blocks(tower), head)


def assemble(
    name: str,
    pretrained: str | None,
    model: nn.Module,
    config: Mapping[str, Any],
    preprocess: Preprocess,
    *,
    trained: bool,
    text: Mapping[str, Tensor] | None = None,
) -> Backbone:
    """Make the backbone of a built CLIP; ``text`` is the model's own state by default."""
    if text is None:
        text = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    dense = DenseModel(
        name=name,
        architecture=config,
        preprocess=preprocess,
        pretrained=pretrained,
        trained=trained,
        text=text,
    )
    return _plain(open_clip_own.assemble("open_clip-vit", dense, model))


def _plain(backbone: Backbone) -> Backbone:
    tower: Any = backbone.tower
    tower.output_tokens = False  # CoCa's would give the captioner's tokens along
    return backbone


@cache
def _names() -> tuple[str, ...]:
    import open_clip

    return (TINY, *(name for name in open_clip.list_models() if _is_plain_vit(config_of(name))))


def _is_plain_vit(config: Mapping[str, Any]) -> bool:
    vision = config["vision_cfg"]
    return (
        isinstance(vision.get("layers", 12), int)
        and not vision.get("timm_model_name")
        # "parallel" and "cascade", for two poolers, are in no configuration and untested there
        and not isinstance(vision.get("attentional_pool"), str)
        and not vision.get("block_type")
        and not any(key.startswith("scale_") or key == "qk_norm" for key in vision)
    )


def _blocks(tower: nn.Module) -> dict[str, Any]:
    blocks = tower.get_submodule("transformer.resblocks")
    return {f"transformer.resblocks.{i}": block for i, block in blocks.named_children()}
