"""Directions inside heads as groups: the widths of queries and keys, and of values, can be cut.

In the right basis the directions of a head are in the order of what they matter
(:mod:`ovsprune.calibration.head_bases`). The dense tower is put in these bases, which changes no
output; after that a direction is a unit like any other. A unit is one direction in every head, so
that all heads of a layer stay equally wide and attention one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ovsprune.core.protocols import Seed
from ovsprune.core.records import Group
from ovsprune.graph.attention import SeparateAttention
from ovsprune.graph.groups import with_costs
from ovsprune.graph.layers import bias_of, weight_of
from ovsprune.slim.directions import dual, turned
from ovsprune.slim.spec import WIDTH_KINDS

__all__ = ["WIDTH_KINDS", "turn", "width_seeds", "with_directions"]

_PARTS = {"qk": ("q_proj", "k_proj"), "vo": ("v_proj", "out_proj")}
_ATTRIBUTES = {"qk": "qk_dim", "vo": "v_dim"}


def width_seeds(seeds: Iterable[Seed]) -> list[Seed]:
    """Two seeds more for every seed of heads: ``NAME.qk`` and ``NAME.vo``, inside attention NAME.

    Their layer is the attention itself, so what protects the heads protects them, too.
    """
    return [
        Seed(f"{s.name}.{kind}", kind, s.name, 1, s.block, s.stream, s.protected)
        for s in seeds
        if s.kind == "heads"
        for kind in WIDTH_KINDS
    ]


def with_directions(
    tower: nn.Module, groups: Iterable[Group], seeds: Sequence[Seed], size: tuple[int, int]
) -> list[Group]:
    """``groups``, and after each group of heads those of the seeds inside it.

    What a direction costs to lose is not known yet, and zero in the new groups' ``known``.

    Args:
        tower: The rewritten dense tower.
        groups: Of heads and others.
        seeds: From :func:`width_seeds`.
        size: Native height and width in pixels, for what a direction costs to keep.
    """
    groups = list(groups)
    by_name = {group.name: group for group in groups}
    inner = [_group(tower, s, by_name[s.layer]) for s in seeds if s.layer in by_name]
    costed = with_costs(tower, inner, size)
    return [one for g in groups for one in (g, *(d for d in costed if d.inside == g.name))]


def _group(tower: nn.Module, seed: Seed, heads: Group) -> Group:
    width = _attention(tower, seed.layer).head_dim
    layers = {f"{seed.layer}.{part}" for part in _PARTS[seed.kind]}
    return replace(
        heads,
        name=seed.name,
        kind=seed.kind,
        units=width,
        slices=tuple(
            replace(part, rows=part.rows.T.contiguous())
            for part in heads.slices
            if part.module in layers
        ),
        floor=1,
        inside=heads.name,
        known=torch.zeros(width, dtype=torch.float64),
        attribute=f"{seed.layer}.{_ATTRIBUTES[seed.kind]}",
    )


@torch.no_grad()
def turn(tower: nn.Module, bases: Mapping[str, Tensor]) -> None:
    """Put heads of a rewritten, uncut tower in other bases, in place; its outputs stay.

    Args:
        tower: The tower.
        bases: Name of a group of directions to T [heads, width, width]
            (:mod:`ovsprune.slim.directions`).
    """
    for name, basis in bases.items():
        place, _, kind = name.rpartition(".")
        attention = _attention(tower, place)
        first, second = (getattr(attention, part) for part in _PARTS[kind])
        for layer, by in [(first, basis), *([(second, dual(basis))] if kind == "qk" else [])]:
            for tensor in (weight_of(layer), bias_of(layer)):
                if tensor is not None:
                    tensor.copy_(turned(tensor, by))
        if kind == "vo":
            weight = weight_of(second)
            weight.copy_(turned(weight.T, dual(basis)).T)


def _attention(tower: nn.Module, name: str) -> SeparateAttention:
    attention = tower.get_submodule(name)
    if not isinstance(attention, SeparateAttention):
        raise TypeError(f"{name} is a {type(attention).__name__}, not rewritten attention")
    return attention
