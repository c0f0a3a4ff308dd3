"""Prunable layers and blocks that several families have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.protocols import PrunableLayer
from ovsprune.core.records import Group, Plan, Slice, StreamPoint
from ovsprune.graph.norms import FoldedNorm, fold_norm, unfold_norm
from ovsprune.slim.activation import find_activations
from ovsprune.slim.spec import ACTIVATIONS
from ovsprune.slim.timm_attention import TimmAttention

__all__ = [
    "channels_layer",
    "fold_norms",
    "has_one_activation",
    "heads_layer",
    "kept_columns",
    "mlp_blocks",
    "mlp_layer",
    "restore_attention",
    "stage_blocks",
    "timm_heads_layer",
    "unfold_norms",
]

# Training-free methods (MaskCLIP, SCLIP, ...) and frameworks such as SAN compute the attention of
# the last block with code of their own, which expects the dense shapes.
_LAST_ATTENTION = "frameworks read the last block's attention directly"

# First layer of an MLP in timm, open_clip and transformers. In a gated MLP, it is one of the two
# layers whose outputs are multiplied; the dependency graph finds the other one.
_FIRST_LAYERS = ("fc1", "fc1_g", "w0", "c_fc", "gate_proj")


def heads_layer(
    block: str,
    path: str,
    width: int,
    stream: StreamPoint | None,
    *,
    last: bool,
    extra_slices: tuple[Slice, ...] = (),
) -> PrunableLayer:
    """Describe the heads of the attention ``path``, which has a layer ``q_proj``.

    One head has ``width`` channels. The heads of the last block are protected.
    """
    return PrunableLayer(
        name=path,
        kind="heads",
        layer=f"{path}.q_proj",
        unit_width=width,
        block=block,
        stream=stream,
        protected=_LAST_ATTENTION if last else None,
        extra_slices=extra_slices,
    )


def timm_heads_layer(
    block: str, path: str, attention: Any, stream: StreamPoint | None, *, last: bool
) -> PrunableLayer:
    """Describe the heads of timm's attention or of :class:`TimmAttention`."""
    # A slim attention keeps the dense num_heads, so it has fewer heads than that.
    count = len(getattr(attention, "kept_heads", range(attention.num_heads)))
    width = getattr(attention, "head_dim", 0) or attention.proj.in_features // count
    # The stored head indices take no part in the computation, so the graph cannot find them.
    index = Slice(f"{path}.heads", "out", torch.arange(count).unsqueeze(1))  # rows [heads, 1]
    return heads_layer(block, path, width, stream, last=last, extra_slices=(index,))


def channels_layer(
    block: str, path: str, layer: str, stream: StreamPoint | None, consumer: str | None = None
) -> PrunableLayer:
    """Describe the output channels of the convolution ``layer`` as the group ``path``."""
    return PrunableLayer(
        name=path,
        kind="channels",
        layer=layer,
        unit_width=1,
        block=block,
        stream=stream,
        consumer=consumer,
    )


def mlp_layer(block: str, mlp: nn.Module, stream: StreamPoint | None) -> PrunableLayer:
    """Describe the hidden units of the MLP ``{block}.mlp``."""
    first = next(name for name in _FIRST_LAYERS if hasattr(mlp, name))
    return PrunableLayer(
        name=f"{block}.mlp",
        kind="mlp",
        layer=f"{block}.mlp.{first}",
        unit_width=1,
        block=block,
        stream=stream,
    )


def restore_attention(blocks: Iterable[Any], name: str = "attn") -> None:
    """Replace rewritten attention in place: by timm's class, or a slim one if heads were cut."""
    for block in blocks:
        attention = getattr(block, name)
        if isinstance(attention, TimmAttention):
            new = TimmAttention(attention) if attention.is_cut else attention.to_dense()
            setattr(block, name, new)


def stage_blocks(
    tower: nn.Module, path: str, between: Sequence[str] = ("downsample",)
) -> dict[str, Any]:
    """Return the blocks of the stages under ``path``, by dotted name, in order of execution.

    ``between`` names modules of a stage that run before its blocks; identities are left out.
    """
    blocks: dict[str, Any] = {}
    for i, stage in enumerate(tower.get_submodule(path).children()):
        for name in between:
            module = stage.get_submodule(name)
            if not isinstance(module, nn.Identity):
                blocks[f"{path}.{i}.{name}"] = module
        children = enumerate(stage.get_submodule("blocks").children())
        blocks |= {f"{path}.{i}.blocks.{j}": block for j, block in children}
    return blocks


def mlp_blocks(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the blocks that have an MLP."""
    return {name: block for name, block in blocks.items() if hasattr(block, "mlp")}


def kept_columns(groups: Iterable[Group], plan: Plan) -> dict[str, Tensor]:
    """Return the input columns that each consumer keeps, int64 [columns], by its dotted name."""
    return {g.consumer: g.columns[plan.kept[g.name]].flatten() for g in groups}


def fold_norms(blocks: Iterable[Any], norms: Mapping[str, str]) -> None:
    """Fold the norm after each consumer into it, in place; ``norms`` maps consumer to norm.

    The folded layer has a bias, to which a recovery can add the mean of removed channels, and its
    output is the activation that the network uses.
    """
    for block in blocks:
        for layer, norm in norms.items():
            # A second call must not fold again: the norm is already part of the layer.
            if not isinstance(getattr(block, norm), FoldedNorm):
                folded, place = fold_norm(getattr(block, layer), getattr(block, norm))
                setattr(block, layer, folded)
                setattr(block, norm, place)


def unfold_norms(
    blocks: Mapping[str, Any], norms: Mapping[str, str], groups: Iterable[Group], plan: Plan
) -> None:
    """Undo :func:`fold_norms` in place, after the units outside of ``plan`` were cut."""
    kept = {
        (part.module, part.axis): part.rows[plan.kept[group.name]].flatten()
        for group in groups
        for part in group.slices
    }
    for name, block in blocks.items():
        for layer, norm in norms.items():
            place = getattr(block, norm)
            if isinstance(place, FoldedNorm):
                # The original tensors are needed at the kept input and output channels only.
                columns, rows = (kept.get((f"{name}.{layer}", axis)) for axis in ("in", "out"))
                plain = unfold_norm(getattr(block, layer), place, columns, rows)
                for attribute, module in zip((layer, norm), plain, strict=True):
                    setattr(block, attribute, module)


def has_one_activation(modules: Iterable[nn.Module]) -> bool:
    """Return True if the modules have one activation function, and slim modules support it."""
    activations = find_activations(modules)
    return len(activations) == 1 and activations <= set(ACTIVATIONS)
