"""What timm's vision transformers compute, step by step: stem, blocks, pooled and dense outputs.

Blocks of these towers read more than the stream (rotary positions), the pooled output may come from
an attention pool with an MLP of its own, and inverted bottlenecks may stand in front of the tokens
(ViTamin, Chen et al. 2024); here all of them are blocks that map stream -> stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.slim.forwards import with_forward

__all__ = [
    "ATTENTION_POOL",
    "attention_pool",
    "timm_vit_blocks",
    "timm_vit_bottlenecks",
    "timm_vit_dense",
    "timm_vit_parts",
    "timm_vit_pooled_and_dense",
]

ATTENTION_POOL = "trunk.attn_pool"
"""Dotted name of the attention pool, the last block where there is one."""

_STEM = "trunk.patch_embed.backbone"

Parts = tuple[
    Callable[[Tensor], Tensor],
    dict[str, nn.Module],
    Callable[[Tensor], tuple[Tensor, Tensor]],
]


def timm_vit_blocks(tower: nn.Module) -> dict[str, Any]:
    """The blocks by dotted name, as they are."""
    blocks = tower.get_submodule("trunk.blocks")
    return {f"trunk.blocks.{i}": block for i, block in blocks.named_children()}


def timm_vit_bottlenecks(tower: nn.Module) -> dict[str, Any]:
    """The inverted bottlenecks in front of the tokens by dotted name, as they are; may be empty."""
    backbone: Any = getattr(tower.get_submodule("trunk.patch_embed"), "backbone", nn.Identity())
    if list(backbone._modules) != ["stem", "stages", "pool"]:
        return {}
    return {
        f"{_STEM}.stages.{i}.{j}": block
        for i, stage in backbone.stages.named_children()
        for j, block in stage.named_children()
    }


def attention_pool(tower: nn.Module) -> Any:
    """The attention pool with an MLP, or None."""
    pool = getattr(tower.get_submodule("trunk"), "attn_pool", None)
    return pool if getattr(pool, "mlp", None) is not None else None


def timm_vit_parts(tower: nn.Module) -> Parts:
    """Stem, blocks and head, at the size that the tower was built for.

    The dense output is what the pooled one would be if a position were the whole picture: it takes
    the class token's place, or is all that the pool sees.

    Args:
        tower: open_clip's ``TimmModel``: a ``trunk`` of timm's, and a ``head``.

    Returns:
        images [B, 3, H, W] -> stream; dotted name -> block, stream -> stream; and
        stream -> (pooled [B, C], dense [B, C, h, w]). Blocks share all their parts with the
        tower's, whatever is done to them.
    """
    model: Any = tower
    trunk, pool = model.trunk, attention_pool(tower)
    stem, blocks = _front(trunk, timm_vit_bottlenecks(tower))
    extra = _rope(trunk)
    for name, block in timm_vit_blocks(tower).items():
        blocks[name] = with_forward(block, partial(_forward, block, extra))
    if pool is not None:
        blocks[ATTENTION_POOL] = with_forward(pool, partial(_pooled_each, trunk, pool))

    def head(stream: Tensor) -> tuple[Tensor, Tensor]:
        if pool is None:
            stream = trunk.norm(stream)
            pooled = _pooled(trunk, stream)
            each = stream[:, trunk.num_prefix_tokens :]
        else:
            pooled, each = stream[:, 0], stream[:, 1:]
        pooled, each = (model.head(trunk.head(trunk.fc_norm(x))) for x in (pooled, each))
        height, width = trunk.patch_embed.grid_size
        return pooled, each.transpose(1, 2).reshape(each.shape[0], -1, height, width)

    return stem, blocks, head


def timm_vit_dense(tower: nn.Module, images: Tensor) -> Tensor:
    """Embedding of each position, [B, 3, H, W] -> [B, C, h, w], not normalised."""
    return timm_vit_pooled_and_dense(tower, images)[1]


def timm_vit_pooled_and_dense(tower: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled [B, C] and dense [B, C, h, w] outputs, not normalised."""
    stem, blocks, head = timm_vit_parts(tower)
    stream = stem(images)
    for block in blocks.values():
        stream = block(stream)
    return head(stream)


def _forward(block: nn.Module, extra: Mapping[str, Tensor], x: Tensor) -> Tensor:
    out: Tensor = type(block).forward(block, x, **extra)
    return out


def _rope(trunk: Any) -> dict[str, Tensor]:
    """What a block reads besides the stream: rotary positions at the trunk's own size."""
    if getattr(trunk, "rope", None) is None:
        return {}
    weight = trunk.patch_embed.proj.weight
    tokens = weight.new_zeros(1, trunk.patch_embed.num_patches, weight.shape[0])
    return {"rope": trunk._pos_embed(tokens)[1]}


def _front(
    trunk: Any, bottlenecks: Mapping[str, nn.Module]
) -> tuple[Callable[[Tensor], Tensor], dict[str, nn.Module]]:
    """The stem, and the blocks that come before those over tokens."""
    if not bottlenecks:
        return partial(_stem, trunk), {}
    backbone = trunk.patch_embed.backbone
    last = with_forward(backbone.pool, partial(_to_tokens, trunk))
    return backbone.stem, {**bottlenecks, f"{_STEM}.pool": last}


def _to_tokens(trunk: Any, x: Tensor) -> Tensor:
    """What comes between the last bottleneck and the first block over tokens."""
    embed = trunk.patch_embed
    pool = embed.backbone.pool
    return _positioned(trunk, embed.proj(type(pool).forward(pool, x)).flatten(2).transpose(1, 2))


def _stem(trunk: Any, images: Tensor) -> Tensor:
    return _positioned(trunk, trunk.patch_embed(images))


def _positioned(trunk: Any, x: Tensor) -> Tensor:
    """Tokens of patches, with positions and the tokens in front of them."""
    if hasattr(trunk, "_pos_embed"):
        found = trunk._pos_embed(x)
        x = trunk.norm_pre(found[0] if isinstance(found, tuple) else found)
    elif trunk.cls_token is not None:  # relative positions are the blocks' own
        x = torch.cat([trunk.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
    return x


def _pooled(trunk: Any, tokens: Tensor) -> Tensor:
    """Pooling without an MLP: the class token, or the mean of the others."""
    if trunk.global_pool == "token":
        return tokens[:, 0]
    return tokens[:, trunk.num_prefix_tokens :].mean(1)


def _pooled_each(trunk: Any, pool: Any, stream: Tensor) -> Tensor:
    """The attention pool over all tokens, and over each position alone.

    A position that is all there is gets all the attention, so what the pool mixes then is that
    position's value.

    Returns:
        [B, 1 + h * w, C].
    """
    tokens = trunk.norm(stream)
    prefix = trunk.num_prefix_tokens
    if prefix and not getattr(trunk, "pool_include_prefix", True):
        tokens, prefix = tokens[:, prefix:], 0
    read = tokens if pool.pos_embed is None else tokens + pool.pos_embed
    heads = (pool.num_heads, pool.head_dim)
    q = pool.q(pool.latent).unflatten(-1, heads).transpose(1, 2).expand(read.shape[0], -1, -1, -1)
    keys, values = pool.kv(read).chunk(2, dim=-1)
    k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in (keys, values))
    mixed = F.scaled_dot_product_attention(pool.q_norm(q), pool.k_norm(k), v)
    both = torch.cat([mixed.transpose(1, 2).flatten(2), values[:, prefix:]], dim=1)
    x = pool.proj(both)
    out: Tensor = x + pool.mlp(pool.norm(x))
    return out
