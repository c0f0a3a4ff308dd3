"""Matches masks to the parameters of a module by name and shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ovsprune.core.errors import TargetError

__all__ = ["Placement", "match"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Assignment of masks to parameters of a module.

    Attributes:
        removed: Prefix that was removed from the names of the masks (``"module"``); may be empty.
        added: Prefix that was added: the dotted name of the tower in the module; may be empty.
        names: Map of mask name to parameter name, for every mask with the parameter's shape.
        missing: Names of the masks for which the module has no parameter.
        shapes: Map of mask name to (shape of the mask, shape of the parameter), if they differ.
    """

    removed: str
    added: str
    names: Mapping[str, str]
    missing: tuple[str, ...]
    shapes: Mapping[str, tuple[Shape, Shape]]

    def __str__(self) -> str:
        """Return the counts of matches and mismatches, with the first few mismatches."""
        place = f"at {self.added!r}" if self.added else "at the top level"
        parts = [f"{len(self.names)} masks have a parameter {place}"]
        if self.removed:
            parts[0] += f", without the prefix {self.removed!r}"
        if self.missing:
            parts.append(f"{len(self.missing)} have none ({_some(self.missing)})")
        if self.shapes:
            differing = [f"{n}: mask {m}, parameter {p}" for n, (m, p) in self.shapes.items()]
            parts.append(f"{len(self.shapes)} have one of another shape ({_some(differing)})")
        return "; ".join(parts)


def match(module: nn.Module, masks: Mapping[str, Tensor], prefix: str | None = None) -> Placement:
    """Find the parameters that masks belong to, without changing anything.

    The names of the masks may lack a prefix of the module (a tower inside a framework), or have a
    common prefix that the module lacks. Every combination is tried, and the one with the most
    masks that have a parameter of their shape is returned.

    Args:
        module: A tower, or a model that contains one.
        masks: Map of name to bool of the weight's shape.
        prefix: Dotted name of the tower in ``module``, if several towers match.

    Raises:
        TargetError: There are no masks, nothing matches, or several towers match equally well. The
            message names them.
    """
    if not masks:
        raise TargetError("there are no masks to place; read them with read_masks first")
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    prefixes = _prefixes_by_suffix(shapes)
    best: list[Placement] = []
    for removed in _common_prefixes(masks):
        # Prefixes with which at least one name is that of a parameter, in order, without copies.
        added = dict.fromkeys(p for name in masks for p in prefixes.get(_stem(name, removed), ()))
        candidates = [_place(masks, shapes, removed, p) for p in added if prefix in (None, p)]
        # Shorter removed prefixes come first, and win if placements are equal.
        best = _best([*best, *candidates])
        # A longer removed prefix can at most tie, and then the shorter one wins.
        if best and len(best[0].names) == len(masks):
            break  # every mask has its parameter
    if not best or not (best[0].names or best[0].shapes):
        raise TargetError(_no_match_message(masks, shapes, prefix))
    least = [p for p in best if len(p.removed) == min(len(q.removed) for q in best)]
    # The module itself is preferred to a submodule of it that fits equally well.
    exact = [p for p in least if not p.added and len(p.names) == len(masks)]
    if len(least) > 1 and not exact:
        raise TargetError(
            f"the masks fit {len(least)} places of {type(module).__name__} equally well: "
            f"{', '.join(repr(p.added) for p in least)}; choose one with prefix=..., or give the "
            "tower itself instead of the model"
        )
    return (exact or least)[0]


def _best(placements: list[Placement]) -> list[Placement]:
    """Return the placements with the most matches; equal assignments are listed once."""
    most = max(((len(p.names), len(p.shapes)) for p in placements), default=(0, 0))
    kept: dict[tuple[str, ...], Placement] = {}
    for placement in placements:
        if (len(placement.names), len(placement.shapes)) == most:
            # Different prefixes can give the same assignment.
            kept.setdefault((*placement.names.values(), *placement.shapes), placement)
    return list(kept.values())


def _place(
    masks: Mapping[str, Tensor], shapes: Mapping[str, Shape], removed: str, added: str
) -> Placement:
    """Match masks by name, with one prefix removed and one added."""
    names: dict[str, str] = {}
    missing: list[str] = []
    differ: dict[str, tuple[Shape, Shape]] = {}
    for name, mask in masks.items():
        target = _stem(name, removed)
        target = f"{added}.{target}" if added else target
        if target not in shapes:
            missing.append(name)
        elif shapes[target] != tuple(mask.shape):
            differ[name] = (tuple(mask.shape), shapes[target])
        else:
            names[name] = target
    return Placement(
        removed=removed, added=added, names=names, missing=tuple(missing), shapes=differ
    )


def _prefixes_by_suffix(names: Iterable[str]) -> dict[str, list[str]]:
    """Map every suffix of the dotted names to the prefixes in front of it."""
    prefixes: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            # i = 0 adds the empty prefix: the names are those of the module itself
            prefixes[".".join(parts[i:])].append(".".join(parts[:i]))
    return prefixes


def _common_prefixes(masks: Iterable[str]) -> list[str]:
    """Return the prefixes that all names share, shortest first; the last part is never included."""
    parts = [name.split(".")[:-1] for name in masks]  # without the parameter's own name
    count = 0
    while all(len(p) > count for p in parts) and len({p[count] for p in parts}) == 1:
        count += 1
    return [".".join(parts[0][:i]) for i in range(count + 1)]


def _stem(name: str, removed: str) -> str:
    """Remove a prefix and its dot."""
    return name[len(removed) + 1 :] if removed else name


def _no_match_message(
    masks: Mapping[str, Tensor], shapes: Mapping[str, Shape], prefix: str | None
) -> str:
    """Return the message for masks of which none has a parameter."""
    where = "" if prefix is None else f" under the prefix {prefix!r}"
    message = (
        f"none of the {len(masks)} masks has a parameter{where} in the module: the masks are named "
        f"{_some(masks)}, the parameters {_some(shapes) or '(there are none)'}"
    )
    if any(name.endswith("_orig") for name in shapes):
        message += (
            "; torch.nn.utils.prune has already pruned the module: call prune.remove on its layers "
            "first"
        )
    return f"{message}. Give a model of the architecture that the masks were made for"


def _some(names: Iterable[str], count: int = 3) -> str:
    """Join the first few names for a message."""
    listed = list(names)
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")
