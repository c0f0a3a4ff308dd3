"""Which parameter of a module each mask belongs to, told by names and shapes."""

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
    """Where masks belong in a module.

    Attributes:
        removed: Prefix that was taken off the masks' names (``"module"``), or "".
        added: Prefix that was put before them: the tower's place in the module, or "".
        names: Mask's name to parameter's name, for every mask whose shape is the parameter's.
        missing: Masks for which the module has no parameter.
        shapes: Masks whose parameter has another shape: name to (the mask's, the parameter's).
    """

    removed: str
    added: str
    names: Mapping[str, str]
    missing: tuple[str, ...]
    shapes: Mapping[str, tuple[Shape, Shape]]

    def __str__(self) -> str:
        """What matched, what did not, and the first few of those."""
        place = f"at {self.added!r}" if self.added else "at the top"
        parts = [f"{len(self.names)} masks have their parameter {place}"]
        if self.removed:
            parts[0] += f", without the prefix {self.removed!r}"
        if self.missing:
            parts.append(f"{len(self.missing)} have none ({_some(self.missing)})")
        if self.shapes:
            faults = [f"{n}: mask {m}, parameter {p}" for n, (m, p) in self.shapes.items()]
            parts.append(f"{len(self.shapes)} have one of another shape ({_some(faults)})")
        return "; ".join(parts)


def match(module: nn.Module, masks: Mapping[str, Tensor], prefix: str | None = None) -> Placement:
    """Find the parameters that masks belong to, without changing anything.

    The names are taken as they are, or behind a prefix that the module has (a tower inside a
    framework), or without a prefix that they all share and the module lacks; the placement where
    the most masks find a parameter of their shape is taken.

    Args:
        module: A tower, or a model that holds one.
        masks: Name to bool of the weight's shape.
        prefix: The tower's dotted name in ``module``, where several would do.

    Raises:
        TargetError: There are no masks, nothing matches, or several places match equally well; the
            message names them.
    """
    if not masks:
        raise TargetError("there are no masks to place; read them with read_masks first")
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    ends = _ends(shapes)
    best: list[Placement] = []
    for removed in _shared(masks):
        found = [
            p
            for added in _places(masks, removed, ends)
            if (p := _place(masks, shapes, removed, added)) and prefix in (None, p.added)
        ]
        # of equal placements, the one that takes the least off the names is meant
        best = _best([*best, *found])
        if best and len(best[0].names) == len(masks):
            break
    if not best or not (best[0].names or best[0].shapes):
        raise TargetError(_nothing(masks, shapes, prefix))
    least = [p for p in best if len(p.removed) == min(len(q.removed) for q in best)]
    exact = [p for p in least if not p.added and len(p.names) == len(masks)]
    if len(least) > 1 and not exact:
        raise TargetError(
            f"the masks fit {len(least)} places of {type(module).__name__} equally well: "
            f"{', '.join(repr(p.added) for p in least)}; give the one that is meant "
            "(prefix=...), or the tower itself instead of the model"
        )
    return (exact or least)[0]


def _best(placements: list[Placement]) -> list[Placement]:
    """The placements with the most masks, each target of names once."""
    most = max(((len(p.names), len(p.shapes)) for p in placements), default=(0, 0))
    kept: dict[tuple[str, ...], Placement] = {}
    for placement in placements:
        if (len(placement.names), len(placement.shapes)) == most:
            kept.setdefault((*placement.names.values(), *placement.shapes), placement)
    return list(kept.values())


def _place(
    masks: Mapping[str, Tensor], shapes: Mapping[str, Shape], removed: str, added: str
) -> Placement:
    names: dict[str, str] = {}
    missing: list[str] = []
    differ: dict[str, tuple[Shape, Shape]] = {}
    for name, mask in masks.items():
        target = _join(added, _stem(name, removed))
        if target not in shapes:
            missing.append(name)
        elif shapes[target] != tuple(mask.shape):
            differ[name] = (tuple(mask.shape), shapes[target])
        else:
            names[name] = target
    return Placement(removed, added, names, tuple(missing), differ)


def _ends(names: Iterable[str]) -> dict[str, list[str]]:
    """Every end of a dotted name, with the prefixes before it."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        for at in range(len(parts)):
            found[".".join(parts[at:])].append(".".join(parts[:at]))
    return found


def _shared(masks: Iterable[str]) -> list[str]:
    """Prefixes that all names share, the empty one first; a name never loses its last part."""
    parts = [name.split(".")[:-1] for name in masks]
    count = 0
    while all(len(p) > count for p in parts) and len({p[count] for p in parts}) == 1:
        count += 1
    return [".".join(parts[0][:at]) for at in range(count + 1)]


def _places(masks: Iterable[str], removed: str, ends: Mapping[str, list[str]]) -> dict[str, None]:
    """Prefixes behind which at least one name is a parameter's, in order."""
    return dict.fromkeys(p for name in masks for p in ends.get(_stem(name, removed), ()))


def _stem(name: str, removed: str) -> str:
    return name[len(removed) + 1 :] if removed else name


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _nothing(masks: Mapping[str, Tensor], shapes: Mapping[str, Shape], prefix: str | None) -> str:
    where = "" if prefix is None else f" behind {prefix!r}"
    said = (
        f"none of the {len(masks)} masks has its parameter{where} in the module: the masks are "
        f"called {_some(masks)}, the parameters {_some(shapes) or 'nothing at all'}"
    )
    if any(name.endswith("_orig") for name in shapes):
        said += (
            "; the module is in the form of torch.nn.utils.prune already: call prune.remove on its "
            "layers first"
        )
    return f"{said}. Give a model of the architecture that the masks were made for"


def _some(items: Iterable[str], count: int = 3) -> str:
    listed = list(items)
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")
