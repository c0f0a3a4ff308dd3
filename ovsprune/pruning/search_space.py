"""The fewest units that stay: ``--floor PATTERN=N``, and none at all with ``--prune-depth``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from ovsprune.core.errors import OptionError
from ovsprune.core.records import Group
from ovsprune.graph.layers import weight_of

__all__ = ["parse_floor", "with_floors", "without_floors"]


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
            found[i] = replace(group, min_units=max(group.min_units, least))
    return found


def without_floors(tower: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """``groups``, of which those that may lose all their units have a floor of 0.

    What a consumer without units gives is its bias, which is all that is left in the stream of an
    attention or an MLP. So nothing is dropped where the consumer's output is not added to a stream;
    nor where a norm or a convolution would be left without a channel, which torch does not have.

    Args:
        tower: The rewritten tower.
        groups: Of it.

    Raises:
        OptionError: No group is of that kind.
    """

    def may_go(group: Group) -> bool:
        weights = (weight_of(tower.get_submodule(s.module)) for s in group.slices)
        return (
            group.stream is not None
            and not group.norms
            and all(weight.ndim < 3 for weight in weights)
        )

    found = [replace(group, min_units=0) if may_go(group) else group for group in groups]
    if all(group.min_units for group in found):
        raise OptionError(
            "--prune-depth: no layer of this model that may be cut can go as a whole, since each "
            "is a convolution or is not added to a residual stream; leave it out"
        )
    return found


def _matches(group: Group, pattern: str) -> bool:
    names = (group.name, group.block, *(part.module for part in group.slices))
    return any(fnmatchcase(name, pattern) for name in names)
