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
from ovsprune.graph.layers import bias_of, weight_of
from ovsprune.slim.directions import dual, turned
from ovsprune.slim.spec import WIDTH_KINDS

__all__ = ["WIDTH_KINDS", "turn", "width_groups", "width_seeds"]

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


def width_groups(
    tower: nn.Module, seeds: Sequence[Seed], heads: Iterable[Group], energies: Mapping[str, Tensor]
) -> list[Group]:
    """The groups of ``seeds``, from the groups of the heads that they lie in; without costs.

    Args:
        tower: The rewritten dense tower.
        seeds: From :func:`width_seeds`.
        heads: Groups of heads; a seed whose heads are not among them gives no group.
        energies: Seed to float64 [width]: what removing each direction costs, falling.
    """
    by_name = {group.name: group for group in heads if group.kind == "heads"}
    return [
        _group(tower, seed, by_name[seed.layer], energies[seed.name])
        for seed in seeds
        if seed.layer in by_name
    ]


def _group(tower: nn.Module, seed: Seed, heads: Group, energies: Tensor) -> Group:
    layers = {f"{seed.layer}.{part}" for part in _PARTS[seed.kind]}
    return replace(
        heads,
        name=seed.name,
        kind=seed.kind,
        units=_attention(tower, seed.layer).head_dim,
        slices=tuple(
            replace(part, rows=part.rows.T.contiguous())
            for part in heads.slices
            if part.module in layers
        ),
        floor=1,
        inside=heads.name,
        known=energies,
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
