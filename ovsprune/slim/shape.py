"""The shape of a CLIP vision transformer, from a slim checkpoint: tensors first, config second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.slim.pooling import PoolerShape
from ovsprune.slim.read import SlimCheckpoint
from ovsprune.slim.vit import BlockShape, VisionTransformer

__all__ = ["build_vision_transformer", "native_grid", "vision_config"]


def build_vision_transformer(checkpoint: SlimCheckpoint) -> VisionTransformer:
    """A tower of the widths of ``checkpoint``, without its weights.

    Widths come from the tensors; pooling, head width and native size, which they cannot say, from
    ``architecture``: open_clip's model config, or its ``vision_cfg`` alone.

    Raises:
        CheckpointError: The tensors are not those of a CLIP vision transformer.
        MissingLibraryError: It is a variant that only the library that made it can build.
    """
    state, vision = checkpoint.tower(), vision_config(checkpoint)
    if "attn_pool_contrastive.query" in state:
        spec = checkpoint.spec
        raise MissingLibraryError(
            f"{checkpoint.path} pools by two attentions, which this ovsprune does not build by "
            f"itself; build the tower with {spec.library} {spec.library_version} and call "
            "ovsprune.apply"
        )
    try:
        width, _, *patch = state["conv1.weight"].shape
        tokens = state["positional_embedding"].shape[0]
        blocks = [_block(checkpoint, state, i) for i in range(_depth(state))]
        output = state["proj"].shape[1] if "proj" in state else width
        heights = (patch[0], patch[1])
        pooler = _pooler(state, vision, width)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors are not those of a CLIP vision transformer ({error}); "
            "copy or write the checkpoint again"
        ) from error
    return VisionTransformer(
        width=width,
        blocks=blocks,
        patch_size=heights,
        grid_size=native_grid(checkpoint, heights, tokens - 1),
        output_dim=output,
        activation=checkpoint.spec.activation,
        pool=str(vision.get("pool_type") or "tok"),
        norm_after_pool=pooler is None and bool(vision.get("final_ln_after_pool", False)),
        pre_norm="ln_pre.weight" in state,
        layer_scale="transformer.resblocks.0.ls_1.gamma" in state,
        projection="proj" in state,
        patch_bias="conv1.bias" in state,
        eps=_eps(vision),
        pooler=pooler,
    )


def vision_config(checkpoint: SlimCheckpoint) -> Mapping[str, Any]:
    """open_clip's ``vision_cfg`` of a checkpoint; empty if it has none."""
    architecture = checkpoint.spec.architecture
    vision = architecture.get("vision_cfg", architecture)
    return vision if isinstance(vision, dict) else {}


def _eps(vision: Mapping[str, Any]) -> float:
    options = vision.get("norm_kwargs")
    eps = options.get("eps") if isinstance(options, dict) else None
    return float(eps) if isinstance(eps, (int, float)) else 1e-5


def _pooler(
    state: Mapping[str, Tensor], vision: Mapping[str, Any], width: int
) -> PoolerShape | None:
    if "attn_pool.query" not in state:
        return None
    queries, own = state["attn_pool.query"].shape
    heads = vision.get("attn_pooler_heads", 8)  # open_clip's default
    if not isinstance(heads, int) or heads < 1 or own % heads:
        raise ValueError(f"attn_pooler_heads is {heads!r} for a width of {own}")
    return PoolerShape(queries, own, width, heads)


def _depth(state: Mapping[str, Tensor]) -> int:
    prefix = "transformer.resblocks."
    found = {int(k[len(prefix) :].partition(".")[0]) for k in state if k.startswith(prefix)}
    if found != set(range(len(found))) or not found:
        raise ValueError(f"blocks {sorted(found)}")
    return len(found)


def _block(checkpoint: SlimCheckpoint, state: Mapping[str, Tensor], i: int) -> BlockShape:
    block = f"transformer.resblocks.{i}"
    name = f"{block}.attn"
    inner = state[f"{name}.out_proj.weight"].shape[1]
    mlp_width = state[f"{block}.mlp.c_fc.weight"].shape[0]
    heads = {layer.name: layer for layer in checkpoint.spec.layers if layer.kind == "heads"}
    if name in heads:
        kept = tuple(checkpoint.mask[name].tolist())
        head = heads[name]
        return BlockShape(head.units, kept, head.unit_width, mlp_width)
    # not in the list, so not cut: all heads, as wide as everywhere else
    widths = [layer.unit_width for layer in heads.values()]
    head_dim = widths[0] if widths else _head_dim(checkpoint)
    count, rest = divmod(inner, head_dim)
    if rest or not count:
        raise ValueError(f"{name} is {inner} wide, no multiple of the head width {head_dim}")
    return BlockShape(count, tuple(range(count)), head_dim, mlp_width)


def _head_dim(checkpoint: SlimCheckpoint) -> int:
    head_width = vision_config(checkpoint).get("head_width", 64)  # open_clip's default
    if not isinstance(head_width, int) or head_width < 1:
        raise ValueError(f"head_width is {head_width!r}")
    return head_width


def native_grid(checkpoint: SlimCheckpoint, patch: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Rows and columns of the native grid, which must make as many tokens as there are.

    Args:
        checkpoint: Of a CLIP vision transformer.
        patch: Height and width of a patch in pixels.
        tokens: Patches that there are positions for.

    Raises:
        CheckpointError: No grid that the config gives makes them, and they make no square.
    """
    height, width = checkpoint.spec.preprocess.size
    size = vision_config(checkpoint).get("image_size")
    sizes = [(height, width)]
    if isinstance(size, int):
        sizes.insert(0, (size, size))
    elif isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int for n in size):
        sizes.insert(0, (size[0], size[1]))
    for rows, columns in ((h // patch[0], w // patch[1]) for h, w in sizes):
        if rows * columns == tokens:
            return rows, columns
    side = int(tokens**0.5)
    if side * side == tokens:
        return side, side
    raise CheckpointError(
        f"{checkpoint.path}: positional_embedding has {tokens} patch positions, which the native "
        f"size {height} x {width} with patches of {patch} does not give; copy or write the "
        "checkpoint again"
    )
