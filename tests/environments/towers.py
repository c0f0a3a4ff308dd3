"""Dense towers as the installed open_clip builds them, in every form, and their outputs."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stand_in import HeadBlock
from torch import Tensor, nn

from ovsprune import SlimCheckpoint
from ovsprune.slim.timm_tower import timm_dense

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def build(folder: Path) -> Any:
    """The CLIP of a folder, its weights too if there are any."""
    import open_clip

    config = json.loads((folder / CONFIG).read_text("utf-8"))["model_cfg"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.CLIP(**config).eval().requires_grad_(False)
    if (folder / WEIGHTS).exists():
        model.load_state_dict(load_file(folder / WEIGHTS))
    return model


@torch.no_grad()
def outputs(tower: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled [B, C] and dense [B, C, h, w], whatever the order inside of the tower."""
    view = next(view for attribute, view in _DENSE.items() if hasattr(tower, attribute))
    return tower(images), view(tower, images)


def _vit_dense(tower: Any, images: Tensor) -> Tensor:
    streams: list[Tensor] = []
    hook = tower.transformer.register_forward_hook(lambda *given: streams.append(given[2]))
    tower(images)
    hook.remove()
    (stream,) = streams
    stream = stream if len(stream) == len(images) else stream.transpose(0, 1)
    tokens = tower.ln_post(stream[:, 1:]) @ tower.proj
    return tokens.transpose(1, 2).unflatten(2, tuple(tower.grid_size))


# The dense output of a kind of tower, by an attribute that only such a tower has.
_DENSE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "transformer": _vit_dense,
    "trunk": timm_dense,
}


@torch.no_grad()
def masked(tower: nn.Module, checkpoint: SlimCheckpoint) -> nn.Module:
    """A copy whose consumers read zeros where the checkpoint's mask cuts: the dense reference."""
    tower = deepcopy(tower)
    for layer in checkpoint.spec.layers:
        gone = torch.ones(layer.units, dtype=torch.bool)
        gone[checkpoint.mask[layer.name]] = False
        columns = gone.repeat_interleave(layer.unit_width)
        readers = [(part.module, part.offset) for part in layer.slices if part.axis == "in"]
        if layer.kind == "heads":
            readers = [(f"{layer.name}.out_proj", 0)]
        for name, offset in readers:
            weight = tower.get_submodule(name).get_parameter("weight")
            weight[:, offset : offset + len(columns)][:, columns] = 0.0
    return tower


def forms(tower: Any) -> Iterator[tuple[str, Any]]:
    """The tower as it was built, and with every other attention that can stand in its blocks."""
    if not hasattr(tower, "transformer"):
        yield "as built", tower
        return
    attention = tower.transformer.resblocks[0].attn
    if not isinstance(attention, nn.MultiheadAttention):
        yield "as built, with the head's Attention", tower
        return
    yield f"as built, {'batch' if attention.batch_first else 'sequence'}-first", tower
    if "batch_first" in inspect.signature(type(tower.transformer).__init__).parameters:
        yield "switched to sequence-first", _sequence_first(deepcopy(tower))
    yield "with open_clip's Attention", _custom_blocks(deepcopy(tower))
    if attention.batch_first:
        stands = deepcopy(tower)
        blocks = stands.transformer.resblocks
        stands.transformer.resblocks = nn.ModuleList(HeadBlock(block) for block in blocks)
        yield "with the head's Attention", stands.eval()


def _options(tower: Any) -> dict[str, Any]:
    block = tower.transformer.resblocks[0]
    width = block.mlp.c_fc.in_features
    return {
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "act_layer": type(block.mlp.gelu),
    }


def _sequence_first(tower: Any) -> Any:
    old = tower.transformer
    width, heads = old.resblocks[0].mlp.c_fc.in_features, old.resblocks[0].attn.num_heads
    new = type(old)(width, len(old.resblocks), heads, batch_first=False, **_options(tower))
    new.load_state_dict(old.state_dict())
    tower.transformer = new
    return tower.eval().requires_grad_(False)


def _custom_blocks(tower: Any) -> Any:
    """Blocks with open_clip's own ``Attention``, called as (x, attn_mask)."""
    from open_clip.transformer import CustomResidualAttentionBlock

    blocks = nn.ModuleList()
    for old in tower.transformer.resblocks:
        width, heads = old.mlp.c_fc.in_features, old.attn.num_heads
        blocks.append(CustomResidualAttentionBlock(width, heads, **_options(tower)))
        blocks[-1].load_state_dict(old.state_dict())
    tower.transformer.resblocks = blocks
    return tower.eval().requires_grad_(False)
