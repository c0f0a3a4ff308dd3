"""Search space of a prune: prunable layers, groups of units, and the minimum units per group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ovsprune.backbones import FAMILIES
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone, PrunableLayer
from ovsprune.core.records import Group
from ovsprune.graph.groups import find_groups
from ovsprune.graph.layers import weight_of
from ovsprune.pruning.floors import parse_floor
from ovsprune.pruning.reprune import mark_cut_before

__all__ = [
    "SearchSpace",
    "allow_empty_groups",
    "match_names",
    "min_units_by_group",
    "raise_min_units",
    "split_protected",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchSpace:
    """Everything that a prune may remove from a tower.

    Attributes:
        tower: Dense tower, rewritten: attention is separate linear maps.
        layers: All prunable layers of the tower, protected ones included, in block order.
        groups: Groups that may be cut.
        protected: Name of a group that may not be cut, and the reason.
    """

    tower: nn.Module
    layers: tuple[PrunableLayer, ...]
    groups: list[Group]
    protected: dict[str, str]

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        tower: nn.Module,
        *,
        protect: Sequence[str] = (),
        floor: Sequence[str] = (),
        uniform_heads: bool = False,
        prune_depth: bool = False,
    ) -> SearchSpace:
        """Rewrite a tower, in place, and find what may be removed from it.

        Args:
            backbone: Model that the tower belongs to.
            tower: Copy of the backbone's tower.
            protect: Patterns of layers to leave uncut.
            floor: Minimum units per group, ``"PATTERN=N"`` each.
            uniform_heads: Offer the heads of every block, the last one included.
            prune_depth: Allow groups to lose all their units.

        Raises:
            OptionError: A pattern matches nothing, nothing may be cut, or the tower does not have
                what an option needs.
        """
        family = FAMILIES.get(backbone.family)
        # First of all: separate maps for queries, keys and values exist only after the rewriting.
        family.rewrite(tower)
        layers = family.prunable_layers(tower)
        # Before split_protected, so that --protect still applies to these heads.
        if uniform_heads:
            layers = _offer_all_heads(layers, backbone.name)
        free, protected = split_protected(layers, protect)
        groups = find_groups(tower, free, backbone.preprocess.size)
        groups = mark_cut_before(backbone.slim, groups)
        if prune_depth:
            groups = allow_empty_groups(tower, groups)
        # After allow_empty_groups, so that a floor wins over a minimum of 0.
        groups = raise_min_units(groups, floor)
        return cls(tower=tower, layers=tuple(layers), groups=groups, protected=protected)


def min_units_by_group(groups: Sequence[Group]) -> dict[str, Any]:
    """Return ``[units, min_units]`` of every group by name, as JSON values."""
    return {g.name: [g.units, g.min_units] for g in groups}


def split_protected(
    layers: Sequence[PrunableLayer], patterns: Sequence[str]
) -> tuple[list[PrunableLayer], dict[str, str]]:
    """Split layers into those that may be cut, and the names of the others with the reason.

    ``patterns`` protect further layers; they match names of groups, blocks and layers.

    Raises:
        OptionError: A pattern matches nothing, or everything is protected.
    """
    protected = {layer.name: layer.protected for layer in layers if layer.protected}
    names = {layer.name: (layer.name, layer.block, layer.layer) for layer in layers}
    for pattern in patterns:
        hits = match_names(f"--protect {pattern!r}", pattern, names, "group")
        protected |= dict.fromkeys(hits, f"--protect {pattern}")
    free = [layer for layer in layers if layer.name not in protected]
    if not free:
        raise OptionError("everything is protected; there is nothing to cut")
    return free, protected


def raise_min_units(groups: Sequence[Group], floors: Sequence[str]) -> list[Group]:
    """Return the groups with their minimum units raised to those of all matching floors.

    A floor is ``"PATTERN=N"``; patterns match the names of a group, its block and its layers.

    Raises:
        OptionError: A floor cannot be parsed, matches nothing, or exceeds the units of a group.
    """
    raised = {g.name: g for g in groups}
    names = {g.name: (g.name, g.block, *(part.module for part in g.slices)) for g in groups}
    for text in floors:
        pattern, value = parse_floor(text)
        for name in match_names(f"--floor {text!r}", pattern, names, "group that may be cut"):
            group = raised[name]
            # The offset keeps rounding errors (0.28 * 25 = 7.000000000000001) from adding a unit.
            least = math.ceil(value * group.units - 1e-9) if value < 1 else int(value)
            if least > group.units:
                raise OptionError(
                    f"--floor {text!r}: {group.name} has only {group.units} {group.kind}; give a "
                    "fraction, or a pattern that does not match it"
                )
            raised[name] = replace(group, min_units=max(group.min_units, least))
    return list(raised.values())


def allow_empty_groups(tower: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """Return the groups, with minimum units of 0 for those that can lose all their units.

    The consumer of an empty group outputs its bias; nothing else of the attention or MLP is left.
    This needs a residual connection around the group. A group with a norm or a convolution keeps a
    unit, because PyTorch has no such layers without channels.

    Raises:
        OptionError: No group can be emptied.
    """

    def can_be_empty(group: Group) -> bool:
        weights = (weight_of(tower.get_submodule(s.module)) for s in group.slices)
        linear = all(weight.ndim < 3 for weight in weights)
        return group.stream is not None and not group.norms and linear

    emptied = [replace(group, min_units=0) if can_be_empty(group) else group for group in groups]
    if all(group.min_units for group in emptied):
        raise OptionError(
            "--prune-depth: no layer of this model that may be cut can be removed entirely, "
            "because each is a convolution or has no residual connection; omit the option"
        )
    return emptied


def _offer_all_heads(layers: Sequence[PrunableLayer], model: str) -> list[PrunableLayer]:
    """Return the layers with the heads of every block unprotected."""
    if not any(layer.kind == "heads" for layer in layers):
        raise OptionError(f"--uniform-heads: {model} has no heads that may be cut; omit the option")
    return [replace(x, protected=None) if x.kind == "heads" else x for x in layers]


def match_names(
    option: str, pattern: str, names: Mapping[str, Sequence[str]], kind: str
) -> list[str]:
    """Return the keys of which one of the names matches an ``fnmatch`` pattern.

    Raises:
        OptionError: The pattern matches nothing; the message begins with ``option``.
    """
    # fnmatchcase, because fnmatch ignores the case of letters on Windows.
    hits = [key for key, values in names.items() if any(fnmatchcase(v, pattern) for v in values)]
    if not hits:
        raise OptionError(
            f"{option} matches no {kind}; {kind.split()[0]}s are named like "
            f"{', '.join(list(names)[:2])}, and * stands for anything"
        )
    return hits
