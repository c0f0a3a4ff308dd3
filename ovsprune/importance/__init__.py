"""Criteria: which units matter. One file each; see :class:`ovsprune.core.protocols.Criterion`."""

from typing import cast

from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import NEEDS, Criterion
from ovsprune.core.registry import Registry

__all__ = ["CRITERIA", "criterion_name", "find_criterion"]

CRITERIA: Registry[Criterion] = Registry("criterion", "ovsprune.importance")


def find_criterion(given: object) -> Criterion:
    """The criterion that a setting means: a registered name, or a criterion itself.

    Raises:
        UnknownNameError: No criterion has this name.
        OptionError: ``given`` is neither a name nor a criterion.
    """
    if isinstance(given, str):
        return CRITERIA.get(given)
    needs = getattr(given, "needs", None)
    wrong = (
        "is a class; make an instance of it"
        if isinstance(given, type)
        else "has no method score"
        if not callable(getattr(given, "score", None))
        else f"needs {needs!r}, expected a frozenset of {', '.join(sorted(NEEDS))}"
        if not isinstance(needs, frozenset) or not needs <= NEEDS
        else "needs gradients and has no callable objective"
        if "gradients" in needs and not callable(getattr(given, "objective", None))
        else None
    )
    if wrong is not None:
        raise OptionError(
            f"criterion {given!r} {wrong}: give a name (`ovsprune criteria` lists them) or an "
            "object with `needs` and `score`, as ovsprune.core.protocols.Criterion says"
        )
    return cast(Criterion, given)


def criterion_name(given: str | Criterion) -> str:
    """What a record calls a criterion: its name, or the class of an object."""
    return given if isinstance(given, str) else type(given).__name__
