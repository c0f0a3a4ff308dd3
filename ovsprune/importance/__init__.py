"""Criteria that score the importance of units, one file each.

See :class:`ovsprune.core.protocols.Criterion`.
"""

from typing import cast

from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import NEEDS, Criterion
from ovsprune.core.registry import Registry

__all__ = ["CRITERIA", "criterion_name", "find_criterion"]

CRITERIA: Registry[Criterion] = Registry("criterion", "ovsprune.importance")


def find_criterion(criterion: object) -> Criterion:
    """Return the criterion with a registered name, or check and return a criterion object.

    Raises:
        UnknownNameError: No criterion has this name.
        OptionError: ``criterion`` is neither a name nor a valid criterion object.
    """
    if isinstance(criterion, str):
        return CRITERIA.get(criterion)
    problem = _problem(criterion)
    if problem is not None:
        raise OptionError(
            f"criterion {criterion!r} {problem}. Give a name (`ovsprune criteria` lists them) or "
            "an object with `needs` and `score` (see ovsprune.core.protocols.Criterion)"
        )
    return cast(Criterion, criterion)


def _problem(criterion: object) -> str | None:
    """Return what a criterion object lacks, as a predicate for the error message, or None."""
    needs = getattr(criterion, "needs", None)
    if isinstance(criterion, type):
        return "is a class, not an instance"
    if not callable(getattr(criterion, "score", None)):
        return "has no method `score`"
    if not isinstance(needs, frozenset) or not needs <= NEEDS:
        return f"has needs={needs!r}, expected a frozenset of {', '.join(sorted(NEEDS))}"
    if "gradients" in needs and not callable(getattr(criterion, "objective", None)):
        return "needs gradients but has no callable `objective`"
    return None


def criterion_name(criterion: str | Criterion) -> str:
    """Return the registered name, or the class name of a criterion object."""
    return criterion if isinstance(criterion, str) else type(criterion).__name__
