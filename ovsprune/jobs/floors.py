"""``--floor PATTERN=N``: the fewest units that stay in the groups whose name matches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ovsprune.core.errors import OptionError
from ovsprune.core.records import Group

__all__ = ["parse_floor", "with_floors"]


def parse_floor(text: str) -> tuple[str, float]:
    """``"*.mlp=0.25"`` as a pattern, and a share in (0, 1) or a whole number of units.

    Raises:
        OptionError: ``text`` is not of that form.
    """
    pattern, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not pattern or not (0 < value < 1 or (value >= 1 and value.is_integer())):
        raise OptionError(
            f"--floor {text!r}: give PATTERN=N, N being a number of units (1, 2, ...) or a share "
            "of them in (0, 1), as in '*.mlp=0.25'"
        )
    return pattern, value


def with_floors(groups: Sequence[Group], floors: Sequence[str]) -> list[Group]:
    """``groups`` with the highest of their own floor and of those whose pattern matches.

    A pattern is held against the names of the group, of its block and of its layers.

    Raises:
        OptionError: A floor cannot be read, matches nothing, or asks for more units than there are.
    """
    found = list(groups)
    for text in floors:
        pattern, value = parse_floor(text)
        hits = [i for i, g in enumerate(found) if _matches(g, pattern)]
        if not hits:
            raise OptionError(
                f"--floor {text!r} matches no group that may be cut; they are named like "
                f"{', '.join(g.name for g in found[:2])}, and * stands for anything"
            )
        for i in hits:
            group = found[i]
            least = math.ceil(value * group.units - 1e-9) if value < 1 else int(value)
            if least > group.units:
                raise OptionError(
                    f"--floor {text!r}: {group.name} has {group.units} {group.kind} only; give a "
                    "share, or a pattern that leaves it out"
                )
            found[i] = replace(group, floor=max(group.floor, least))
    return found


def _matches(group: Group, pattern: str) -> bool:
    names = (group.name, group.block, *(part.module for part in group.slices))
    return any(fnmatchcase(name, pattern) for name in names)
