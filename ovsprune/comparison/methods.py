"""Names of methods to compare, such as ``default``, ``random+closed-form`` or ``torch-pruning``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ovsprune.allocation import ALLOCATIONS
from ovsprune.baselines.torch_pruning import TORCH_PRUNING_METHODS
from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.options import Option, options_of
from ovsprune.importance import CRITERIA
from ovsprune.pruning.config import PruneConfig
from ovsprune.recovery import RECOVERIES

__all__ = ["DEFAULT", "IMP", "Method", "parse_method", "parse_methods", "parse_options"]

DEFAULT = "default"
"""Name of the method with the default options of ``prune``."""

IMP = "imp"
"""Name of iterative magnitude pruning of whole units with feature distillation."""


@dataclass(frozen=True)
class Method:
    """Method of a comparison.

    Attributes:
        name: Name as the user gave it.
        criterion: Name in the registry of criteria; for Torch-Pruning the name of the method.
        allocation: Name in the registry of allocations; ``"own"`` for Torch-Pruning.
        recovery: Name in the registry of recoveries; None for Torch-Pruning on the original tower,
            as its users would run it.
        source: Implementation that selects the units; ``"imp"`` also trains the tower.
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
    """Parse names of methods, without repetitions, in the given order.

    Args:
        names: Names, lists ``"a,b,c"`` of names, or one such text.

    Raises:
        OptionError: There is no name, or a part is given twice.
        UnknownNameError: A part is unknown.
    """
    lists = [names] if isinstance(names, str) else names
    given = [part.strip() for name in lists for part in name.split(",")]
    # filter: an empty name comes from a trailing comma.
    methods = tuple(parse_method(name) for name in dict.fromkeys(filter(None, given)))
    if not methods:
        raise OptionError("--methods names none; give for example --methods default,random")
    return methods


def parse_method(name: str) -> Method:
    """Parse the name of a method: parts joined by ``+``, then options, each after a ``:``.

    The first part is ``default``, a criterion, or a method of Torch-Pruning; ``imp`` stands alone.
    A criterion alone means that criterion with uniform allocation and no recovery. The parts that
    follow are an allocation, a recovery, or both. A name that is both is the allocation, unless
    there is one already. Options are those of ``prune`` that belong to a single method;
    :meth:`ovsprune.PruneConfig.check` refuses combinations that have no effect.

    >>> parse_method("random+closed-form").recovery
    'closed-form'
    >>> parse_method("default:rounds=3:prune-depth").options
    (('rounds', 3), ('prune_depth', True))

    Raises:
        OptionError: A part is given twice, or an allocation to a method of Torch-Pruning.
        UnknownNameError: A part is unknown; names the closest.
    """
    parts, *given = name.split(":")
    options = tuple(parse_options(name, given).items())
    first, *rest = (part.strip() for part in parts.split("+"))
    # IMP ranks by the L1 norm of a unit over all layers; it takes no part of ours.
    if first == IMP:
        if rest:
            raise OptionError(f"--methods {name}: imp has its own ranking, budget and repair")
        return Method(
            name=name,
            criterion="l1",
            allocation="global",
            recovery="none",
            source="imp",
            options=options,
        )
    if first in TORCH_PRUNING_METHODS:
        repairs = {o.name for o in options_of(PruneConfig) if o.path[0] == "distill"}
        if {option for option, _ in options} - repairs:
            raise OptionError(
                f"--methods {name}: {first} has its own selection; it takes only the options of a "
                "recovery, distill-..."
            )
        return _torch_pruning_method(name, first, rest, options)
    if first == DEFAULT:
        # The ratio has no default; any value serves here.
        plain = PruneConfig(ratio=0.5)
        assert isinstance(plain.criterion, str)  # the default is a name
        criterion, allocation, recovery = plain.criterion, plain.allocation, plain.recovery
    elif first in CRITERIA.names():
        criterion, allocation, recovery = first, "uniform", "none"
    else:
        raise UnknownNameError(
            "method", first, [DEFAULT, IMP, *TORCH_PRUNING_METHODS, *CRITERIA.names()]
        )
    seen: set[str] = set()  # kinds of parts that were given
    for part in rest:
        kind = _kind(part, seen)
        if kind in seen:
            raise OptionError(f"--methods {name}: {part!r} is a second {kind}; give at most one")
        seen.add(kind)
        if kind == "allocation":
            allocation = part
        else:
            recovery = part
    return Method(
        name=name,
        criterion=criterion,
        allocation=allocation,
        recovery=recovery,
        source="ovsprune",
        options=options,
    )


def _kind(part: str, seen: set[str]) -> str:
    """Return ``"allocation"`` or ``"recovery"`` for a part after the first."""
    allocates, repairs = part in ALLOCATIONS.names(), part in RECOVERIES.names()
    if not (allocates or repairs):
        known = [*ALLOCATIONS.names(), *RECOVERIES.names()]
        raise UnknownNameError("allocation or recovery", part, dict.fromkeys(known))
    if allocates and repairs:
        return "recovery" if "allocation" in seen else "allocation"
    return "allocation" if allocates else "recovery"


def _torch_pruning_method(
    name: str, first: str, rest: list[str], options: tuple[tuple[str, Any], ...]
) -> Method:
    """Return a method of Torch-Pruning, alone or followed by one of our recoveries."""
    if len(rest) > 1:
        raise OptionError(f"--methods {name}: {first} takes one recovery after the '+'")
    if rest and rest[0] in ALLOCATIONS.names() and rest[0] not in RECOVERIES.names():
        raise OptionError(
            f"--methods {name}: {first} has its own allocation; give a recovery after the '+'"
        )
    if rest:
        RECOVERIES.get(rest[0])  # raises for an unknown name
    return Method(
        name=name,
        criterion=first,
        allocation="own",
        recovery=rest[0] if rest else None,
        source="torch-pruning",
        options=options,
    )


def parse_options(name: str, parts: Iterable[str], config: type = PruneConfig) -> dict[str, Any]:
    """Return option names and values of the parts ``OPTION=VALUE`` and ``FLAG`` of a method.

    Args:
        name: Name of the method with its options, for messages.
        parts: Options as on the command line of ``prune``, without the leading dashes.
        config: Configuration that declares the options.

    Raises:
        OptionError: A value is missing or cannot be read, a flag has a value, or an option that is
            not repeatable is given twice.
        UnknownNameError: There is no such option; the message names the closest.
    """
    known = {o.name.replace("_", "-"): o for o in options_of(config) if o.compare == "method"}
    values: dict[str, Any] = {}
    for part in parts:
        word, equals, text = (piece.strip() for piece in part.partition("="))
        if word not in known:
            raise UnknownNameError("option of a method", word, known)
        declared = known[word]
        value = _value(name, word, declared, text if equals else None)
        if declared.repeated:
            values[declared.name] = (*values.get(declared.name, ()), value)
        elif declared.name in values:
            raise OptionError(f"--methods {name}: {word} is given twice")
        else:
            values[declared.name] = value
    return values


def _value(name: str, word: str, declared: Option, text: str | None) -> Any:
    if declared.value_type is bool:
        if text is not None:
            raise OptionError(f"--methods {name}: {word} takes no value; leave out '={text}'")
        return True
    if not text:
        raise OptionError(f"--methods {name}: {word} needs a value, as in {word}=...")
    try:
        return declared.value_type(text)
    except ValueError as error:
        kind = "a whole number" if declared.value_type is int else "a number"
        raise OptionError(f"--methods {name}: {word} needs {kind}, not {text!r}") from error
