"""Build a CLIP vision transformer with the widths of a slim checkpoint.

Widths are read from the tensors; the config gives only what tensor shapes do not determine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.slim.pooling import PoolerShape
from ovsprune.slim.read import SlimCheckpoint
from ovsprune.slim.vit import BlockShape, VisionTransformer

__all__ = ["build_vision_transformer", "head_width", "native_grid", "vision_config"]


def build_vision_transformer(checkpoint: SlimCheckpoint) -> VisionTransformer:
    """Build a tower with the layer widths of ``checkpoint``, without its weights.

    Widths come from the tensor shapes. Pooling, head width and native size come from
    ``architecture`` in the config: open_clip's model config, or only its ``vision_cfg``.

    Raises:
        CheckpointError: The tensors do not form a CLIP vision transformer, or the config does not
            fit them.
        MissingLibraryError: The tower has two attention pools; only open_clip can build it.
    """
    state, vision = checkpoint.tower(), vision_config(checkpoint)
    if "attn_pool_contrastive.query" in state:
        spec = checkpoint.spec
        raise MissingLibraryError(
            f"{checkpoint.path}: the tower has two attention pools (contrastive and captioning), "
            "which this ovsprune cannot build without open_clip; build the tower with "
            f"{spec.library} {spec.library_version} and call ovsprune.apply"
        )
    try:
        width, _, *patch = state["conv1.weight"].shape  # [D, 3, height, width]
        tokens = state["positional_embedding"].shape[0]
        blocks = [_block(checkpoint, state, i) for i in range(_depth(state))]
        output = state["proj"].shape[1] if "proj" in state else width
        patch_size = (patch[0], patch[1])
        pooler = _pooler(state, vision, width)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors do not form a CLIP vision transformer ({error}); copy "
            "the checkpoint again, or write it again from the pruned model"
        ) from error
    return VisionTransformer(
        width=width,
        blocks=blocks,
        patch_size=patch_size,
        grid_size=native_grid(checkpoint, patch_size, tokens - 1),
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
    """Return open_clip's ``vision_cfg`` from the config of a checkpoint; empty if it has none."""
    architecture = checkpoint.spec.architecture
    vision = architecture.get("vision_cfg", architecture)
    return vision if isinstance(vision, dict) else {}


def _eps(vision: Mapping[str, Any]) -> float:
    """Return the epsilon of the layer norms; torch's default if the config has none."""
    options = vision.get("norm_kwargs")
    eps = options.get("eps") if isinstance(options, dict) else None
    return float(eps) if isinstance(eps, (int, float)) else 1e-5


def _pooler(
    state: Mapping[str, Tensor], vision: Mapping[str, Any], width: int
) -> PoolerShape | None:
    """Return the widths of the attention pool, or None if there is no pool."""
    if "attn_pool.query" not in state:
        return None
    queries, pool_width = state["attn_pool.query"].shape  # [queries, width]
    heads = vision.get("attn_pooler_heads", 8)  # open_clip's default
    if not isinstance(heads, int) or heads < 1 or pool_width % heads:
        raise ValueError(f"attn_pooler_heads is {heads!r} for a width of {pool_width}")
    return PoolerShape(queries, pool_width, width, heads)


def _depth(state: Mapping[str, Tensor]) -> int:
    """Count the blocks; a ValueError reports numbers other than 0, 1, 2, ..."""
    prefix = "transformer.resblocks."
    numbers = {int(k[len(prefix) :].partition(".")[0]) for k in state if k.startswith(prefix)}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ValueError(f"blocks {sorted(numbers)}")
    return len(numbers)


def _block(checkpoint: SlimCheckpoint, state: Mapping[str, Tensor], i: int) -> BlockShape:
    """Return the widths of block ``i``."""
    block = f"transformer.resblocks.{i}"
    name = f"{block}.attn"
    inner = state[f"{name}.out_proj.weight"].shape[1]  # kept heads * head width
    mlp_width = state[f"{block}.mlp.c_fc.weight"].shape[0]
    heads = {layer.name: layer for layer in checkpoint.spec.layers if layer.kind == "heads"}
    if name in heads:
        kept = tuple(checkpoint.mask[name].tolist())
        head = heads[name]
        return BlockShape(head.units, kept, head.unit_width, mlp_width)
    # The config lists pruned layers only. This one has all heads, as wide as those of the others.
    widths = [layer.unit_width for layer in heads.values()]
    head_dim = widths[0] if widths else head_width(checkpoint)
    count, rest = divmod(inner, head_dim)
    if rest or not count:
        raise ValueError(
            f"{name} has width {inner}, which is no multiple of the head width {head_dim}"
        )
    return BlockShape(count, tuple(range(count)), head_dim, mlp_width)


def head_width(checkpoint: SlimCheckpoint) -> int:
    """Return the width of one head that the config gives.

    Raises:
        ValueError: It is not a positive integer.
    """
    width = vision_config(checkpoint).get("head_width", 64)  # open_clip's default
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"head_width is {width!r}")
    return width


def native_grid(checkpoint: SlimCheckpoint, patch: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Return rows and columns of the native grid of positions.

    Tried in this order: ``image_size`` of the architecture, the size of the preprocessing, a
    square.

    Args:
        checkpoint: Checkpoint of a CLIP tower.
        patch: Height and width in pixels of the area of one position.
        tokens: Number of positions, without the class token.

    Raises:
        CheckpointError: None of these grids has ``tokens`` positions.
    """
    height, width = checkpoint.spec.preprocess.size
    size = vision_config(checkpoint).get("image_size")
    sizes = [(height, width)]
    pair = [size, size] if isinstance(size, int) else size
    # type() and not isinstance: JSON's true would count as an int.
    if isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int for n in pair):
        sizes.insert(0, (pair[0], pair[1]))
    for rows, columns in ((h // patch[0], w // patch[1]) for h, w in sizes):
        if rows * columns == tokens:
            return rows, columns
    side = int(tokens**0.5)
    if side * side == tokens:
        return side, side
    raise CheckpointError(
        f"{checkpoint.path}: positional_embedding has {tokens} patch positions, which fits "
        f"neither the native size {height} x {width} with patches of {patch} nor a square; copy "
        "the checkpoint again, or write it again from the pruned model"
    )
