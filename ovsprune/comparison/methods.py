"""Names of methods to compare: ``default``, ``random+closed-form``, ``torch-pruning`` ..."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ovsprune.allocation import ALLOCATIONS
from ovsprune.baselines.torch_pruning import STOCK
from ovsprune.comparison.method_options import parse_options
from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.options import options_of
from ovsprune.importance import CRITERIA
from ovsprune.pruning.config import PruneConfig
from ovsprune.recovery import RECOVERIES

__all__ = ["DEFAULT", "IMP", "Method", "parse_method", "parse_methods"]

DEFAULT = "default"
"""The method that ``prune`` takes when nothing is said."""

IMP = "imp"
"""Iterative magnitude pruning of whole units with feature distillation: the paper's, structured."""


@dataclass(frozen=True)
class Method:
    """One way to prune.

    Attributes:
        name: As it was given.
        criterion: Name in the registry of criteria; for a stock method the method's own name.
        allocation: Name in the registry of allocations; ``"own"`` for a stock method.
        recovery: Name in the registry of recoveries; None for a stock method that is run on the
            original tower, as a user of that library would.
        source: Who selects: ``"ovsprune"``, ``"torch-pruning"``, or ``"imp"``, which trains, too.
        options: Names and values of further options of :class:`ovsprune.PruneConfig`.
    """

    name: str
    criterion: str
    allocation: str
    recovery: str | None
    source: Literal["ovsprune", "torch-pruning", "imp"]
    options: tuple[tuple[str, Any], ...] = ()

    def settings(self, common: PruneConfig) -> PruneConfig:
        """Return the configuration of a row, where ``common`` holds for all rows."""
        chosen: dict[str, object] = {"recovery": self.recovery or "none"}
        if self.source == "ovsprune":
            chosen |= {"criterion": self.criterion, "allocation": self.allocation}
        if self.source == "imp":
            chosen |= {"method": "imp", "imp_structured": True}
        return common.with_options({**chosen, **dict(self.options)})


def parse_methods(names: Iterable[str]) -> tuple[Method, ...]:
    """The methods of names or of lists ``"a,b,c"``, or of one such, each once, in their order.

    Raises:
        OptionError: There is none, or a part is given twice.
        UnknownNameError: A part is unknown.
    """
    lists = [names] if isinstance(names, str) else names
    given = [part.strip() for name in lists for part in name.split(",")]
    methods = tuple(parse_method(name) for name in dict.fromkeys(filter(None, given)))
    if not methods:
        raise OptionError("--methods names none; give for example --methods default,random")
    return methods


def parse_method(name: str) -> Method:
    """The method called ``name``: parts with ``+`` between them, then options after a ``:`` each.

    The first part is ``default``, a criterion, or a stock method; ``imp`` stands alone. A criterion
    alone means that criterion with uniform allocation and no recovery. Parts that follow are an
    allocation, a recovery, or both; a name that is both an allocation and a recovery is the
    allocation unless there is one already. Options are those of ``prune`` that belong to a single
    method; :meth:`ovsprune.PruneConfig.check` refuses combinations that have no effect.

    >>> parse_method("random+closed-form").recovery
    'closed-form'
    >>> parse_method("default:rounds=3:prune-depth").options
    (('rounds', 3), ('prune_depth', True))

    Raises:
        OptionError: A part is given twice, or an allocation to a stock method.
        UnknownNameError: A part is unknown; names the closest.
    """
    parts, *given = name.split(":")
    options = tuple(parse_options(name, given).items())
    first, *rest = (part.strip() for part in parts.split("+"))
    if first == IMP:
        if rest:
            raise OptionError(f"--methods {name}: imp ranks, counts and repairs in its own way")
        return Method(name, "l1", "global", "none", "imp", options)
    if first in STOCK:
        repairs = {o.name for o in options_of(PruneConfig) if o.path[0] == "distill"}
        if {option for option, _ in options} - repairs:
            raise OptionError(
                f"--methods {name}: {first} chooses in its own way; of the options, it takes those "
                "of a recovery, distill-..."
            )
        return _stock_method(name, first, rest, options)
    if first == DEFAULT:
        plain = PruneConfig(ratio=0.5)
        assert isinstance(plain.criterion, str)  # the default is a name
        criterion, allocation, recovery = plain.criterion, plain.allocation, plain.recovery
    elif first in CRITERIA.names():
        criterion, allocation, recovery = first, "uniform", "none"
    else:
        raise UnknownNameError("method", first, [DEFAULT, IMP, *STOCK, *CRITERIA.names()])
    seen: set[str] = set()
    for part in rest:
        room = _room(part, seen)
        if room in seen:
            raise OptionError(f"--methods {name}: {part!r} is a second {room}; give at most one")
        seen.add(room)
        if room == "allocation":
            allocation = part
        else:
            recovery = part
    return Method(name, criterion, allocation, recovery, "ovsprune", options)


def _room(part: str, seen: set[str]) -> str:
    """Whether a later part is an allocation or a recovery."""
    allocates, repairs = part in ALLOCATIONS.names(), part in RECOVERIES.names()
    if not (allocates or repairs):
        known = [*ALLOCATIONS.names(), *RECOVERIES.names()]
        raise UnknownNameError("allocation or recovery", part, dict.fromkeys(known))
    if allocates and repairs:
        return "recovery" if "allocation" in seen else "allocation"
    return "allocation" if allocates else "recovery"


def _stock_method(
    name: str, first: str, rest: list[str], options: tuple[tuple[str, Any], ...]
) -> Method:
    """A stock method, as it is or followed by a recovery of ours."""
    if len(rest) > 1:
        raise OptionError(f"--methods {name}: {first} takes one recovery after the '+'")
    if rest and rest[0] in ALLOCATIONS.names() and rest[0] not in RECOVERIES.names():
        raise OptionError(
            f"--methods {name}: {first} brings its own allocation; give a recovery after the '+'"
        )
    if rest:
        RECOVERIES.get(rest[0])
    return Method(name, first, "own", rest[0] if rest else None, "torch-pruning", options)
