"""Dense towers of the installed open_clip with its kinds of attention, and their outputs."""

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
    """Build the CLIP of a folder, and load its weights if it contains any."""
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
    """Return pooled [B, C] and dense [B, C, h, w] outputs, for either order of the axes inside."""
    dense = next(dense for name, dense in _DENSE.items() if hasattr(tower, name))
    return tower(images), dense(tower, images)


def _vit_dense(tower: Any, images: Tensor) -> Tensor:
    streams: list[Tensor] = []
    hook = tower.transformer.register_forward_hook(lambda *args: streams.append(args[2]))
    tower(images)
    hook.remove()
    (stream,) = streams
    stream = stream if len(stream) == len(images) else stream.transpose(0, 1)
    tokens = tower.ln_post(stream[:, 1:]) @ tower.proj
    return tokens.transpose(1, 2).unflatten(2, tuple(tower.grid_size))


# Function for the dense output, by an attribute that only this kind of tower has.
_DENSE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "transformer": _vit_dense,
    "trunk": timm_dense,
}


@torch.no_grad()
def masked(tower: nn.Module, checkpoint: SlimCheckpoint) -> nn.Module:
    """Return a copy in which the weights that read removed units are zero: the reference."""
    tower = deepcopy(tower)
    for layer in checkpoint.spec.layers:
        removed = torch.ones(layer.units, dtype=torch.bool)
        removed[checkpoint.mask[layer.name]] = False
        columns = removed.repeat_interleave(layer.unit_width)
        readers = [(part.module, part.offset) for part in layer.slices if part.axis == "in"]
        if layer.kind == "heads":
            readers = [(f"{layer.name}.out_proj", 0)]
        for name, offset in readers:
            weight = tower.get_submodule(name).get_parameter("weight")
            weight[:, offset : offset + len(columns)][:, columns] = 0.0
    return tower


def forms(tower: Any) -> Iterator[tuple[str, Any]]:
    """Yield the tower as built, and with each other kind of attention that its blocks support."""
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
        replaced = deepcopy(tower)
        blocks = replaced.transformer.resblocks
        replaced.transformer.resblocks = nn.ModuleList(HeadBlock(block) for block in blocks)
        yield "with the head's Attention", replaced.eval()


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
    """Replace the blocks by those with open_clip's ``Attention``, called as (x, attn_mask)."""
    from open_clip.transformer import CustomResidualAttentionBlock

    blocks = nn.ModuleList()
    for old in tower.transformer.resblocks:
        width, heads = old.mlp.c_fc.in_features, old.attn.num_heads
        blocks.append(CustomResidualAttentionBlock(width, heads, **_options(tower)))
        blocks[-1].load_state_dict(old.state_dict())
    tower.transformer.resblocks = blocks
    return tower.eval().requires_grad_(False)
