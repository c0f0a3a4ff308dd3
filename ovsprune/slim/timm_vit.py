"""Forward pass of timm's vision transformers in parts: stem, blocks, pooled and dense outputs.

Every block maps the residual stream to the residual stream. Rotary positions, which timm passes to
each block, are bound to it here. An attention pool with an MLP is the last block. Inverted
bottlenecks before the tokens (ViTamin, Chen et al., CVPR 2024) are the first blocks.

Letters: B images, N tokens, D the width of the residual stream, C the width of the embedding,
h rows and w columns of patches.
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
    "timm_vit_parts",
    "timm_vit_pooled_and_dense",
]

ATTENTION_POOL = "trunk.attn_pool"
"""Dotted name of the attention pool, which is the last block if it exists."""

_STEM = "trunk.patch_embed.backbone"

Parts = tuple[
    Callable[[Tensor], Tensor], dict[str, nn.Module], Callable[[Tensor], tuple[Tensor, Tensor]]
]


def timm_vit_blocks(tower: nn.Module) -> dict[str, Any]:
    """Return the transformer blocks by dotted name."""
    blocks = tower.get_submodule("trunk.blocks")
    return {f"trunk.blocks.{i}": block for i, block in blocks.named_children()}


def timm_vit_bottlenecks(tower: nn.Module) -> dict[str, Any]:
    """Return the inverted bottlenecks before the tokens by dotted name; empty if there are none."""
    backbone: Any = getattr(tower.get_submodule("trunk.patch_embed"), "backbone", nn.Identity())
    if list(backbone._modules) != ["stem", "stages", "pool"]:
        return {}
    return {
        f"{_STEM}.stages.{i}.{j}": block
        for i, stage in backbone.stages.named_children()
        for j, block in stage.named_children()
    }


def attention_pool(tower: nn.Module) -> Any:
    """Return the attention pool if it has an MLP, else None."""
    pool = getattr(tower.get_submodule("trunk"), "attn_pool", None)
    return pool if getattr(pool, "mlp", None) is not None else None


def timm_vit_parts(tower: nn.Module) -> Parts:
    """Split the forward pass of a tower, for images of its native size, into parts.

    The dense output of a position is the pooled output for that position alone: the position
    replaces the class token, or is the only token of the attention pool.

    Args:
        tower: open_clip's ``TimmModel``, with a ``trunk`` of timm and a ``head``.

    Returns:
        (stem, blocks, head). The stem maps images [B, 3, H, W] to the stream. The blocks, by dotted
        name, map the stream to the stream and share all submodules with the tower. The head maps
        the stream to (pooled [B, C], dense [B, C, h, w]).
    """
    model: Any = tower
    trunk, pool = model.trunk, attention_pool(tower)
    stem, blocks = _front(trunk, timm_vit_bottlenecks(tower))
    rope = _rope(trunk)
    for name, block in timm_vit_blocks(tower).items():
        blocks[name] = with_forward(block, partial(_forward, block, rope))
    if pool is not None:
        blocks[ATTENTION_POOL] = with_forward(pool, partial(_pool_each, trunk, pool))

    def head(stream: Tensor) -> tuple[Tensor, Tensor]:
        if pool is None:
            stream = trunk.norm(stream)
            pooled = _pooled(trunk, stream)
            patches = stream[:, trunk.num_prefix_tokens :]
        else:
            pooled, patches = stream[:, 0], stream[:, 1:]
        # [B, C] and [B, h * w, C]
        pooled, patches = (model.head(trunk.head(trunk.fc_norm(x))) for x in (pooled, patches))
        height, width = trunk.patch_embed.grid_size
        dense = patches.transpose(1, 2).reshape(patches.shape[0], -1, height, width)
        return pooled, dense

    return stem, blocks, head


def timm_vit_pooled_and_dense(tower: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute pooled [B, C] and dense [B, C, h, w] outputs in one pass, not normalised."""
    stem, blocks, head = timm_vit_parts(tower)
    stream = stem(images)
    for block in blocks.values():
        stream = block(stream)
    return head(stream)


def _forward(block: nn.Module, rope: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Apply the forward of timm's class to ``block``."""
    out: Tensor = type(block).forward(block, x, **rope)
    return out


def _rope(trunk: Any) -> dict[str, Tensor]:
    """Return the keyword argument with rotary positions at the native size; empty without them."""
    if getattr(trunk, "rope", None) is None:
        return {}
    weight = trunk.patch_embed.proj.weight
    tokens = weight.new_zeros(1, trunk.patch_embed.num_patches, weight.shape[0])
    return {"rope": trunk._pos_embed(tokens)[1]}


def _front(
    trunk: Any, bottlenecks: Mapping[str, nn.Module]
) -> tuple[Callable[[Tensor], Tensor], dict[str, nn.Module]]:
    """Return the stem and the blocks before the transformer blocks."""
    if not bottlenecks:
        return lambda images: _positioned(trunk, trunk.patch_embed(images)), {}
    backbone = trunk.patch_embed.backbone
    to_tokens = with_forward(backbone.pool, partial(_to_tokens, trunk))
    return backbone.stem, {**bottlenecks, f"{_STEM}.pool": to_tokens}


def _to_tokens(trunk: Any, x: Tensor) -> Tensor:
    """Map the output of the last bottleneck [B, K, H, W] to tokens [B, N, D]."""
    embed = trunk.patch_embed
    pool = embed.backbone.pool
    return _positioned(trunk, embed.proj(type(pool).forward(pool, x)).flatten(2).transpose(1, 2))


def _positioned(trunk: Any, x: Tensor) -> Tensor:
    """Add positions and prefix tokens to patch tokens, [B, h * w, D] -> [B, N, D]."""
    if hasattr(trunk, "_pos_embed"):
        embedded = trunk._pos_embed(x)  # a pair (tokens, rotary positions) in some classes
        x = trunk.norm_pre(embedded[0] if isinstance(embedded, tuple) else embedded)
    elif trunk.cls_token is not None:  # positions are relative and added in the blocks
        x = torch.cat([trunk.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
    return x


def _pooled(trunk: Any, tokens: Tensor) -> Tensor:
    """Pool tokens [B, N, D] to the class token or the mean of the patch tokens, [B, D]."""
    if trunk.global_pool == "token":
        return tokens[:, 0]
    return tokens[:, trunk.num_prefix_tokens :].mean(1)


def _pool_each(trunk: Any, pool: Any, stream: Tensor) -> Tensor:
    """Apply the attention pool to all tokens and to each alone, [B, N, D] -> [B, 1 + h * w, D].

    Attention to a single token has weight 1, so its output is the projected value of that token.
    """
    tokens = trunk.norm(stream)
    prefix = trunk.num_prefix_tokens
    if prefix and not getattr(trunk, "pool_include_prefix", True):
        tokens, prefix = tokens[:, prefix:], 0
    context = tokens if pool.pos_embed is None else tokens + pool.pos_embed  # [B, N, D]
    heads = (pool.num_heads, pool.head_dim)
    q = pool.q(pool.latent).unflatten(-1, heads).transpose(1, 2)  # [1, heads, 1, head_dim]
    q = q.expand(context.shape[0], -1, -1, -1)  # [B, heads, 1, head_dim]
    keys, values = pool.kv(context).chunk(2, dim=-1)  # each [B, N, D]
    # each [B, heads, N, head_dim]
    k, v = (y.unflatten(-1, heads).transpose(1, 2) for y in (keys, values))
    mixed = F.scaled_dot_product_attention(pool.q_norm(q), pool.k_norm(k), v)
    # [B, 1 + h * w, D]
    outputs = torch.cat([mixed.transpose(1, 2).flatten(2), values[:, prefix:]], dim=1)
    x = pool.proj(outputs)
    out: Tensor = x + pool.mlp(pool.norm(x))
    return out
