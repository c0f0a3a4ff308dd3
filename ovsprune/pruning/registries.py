"""Names in the registries, for the declarations of options.

Every function imports its registry when it is called: the declarations are read by the command
line before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["allocations", "check_criterion", "check_floor", "criteria", "recoveries"]


def criteria() -> Iterable[str]:
    """Return the names of the criteria."""
    from ovsprune.importance import CRITERIA

    return CRITERIA.names()


def allocations() -> Iterable[str]:
    """Return the names of the allocations."""
    from ovsprune.allocation import ALLOCATIONS

    return ALLOCATIONS.names()


def recoveries() -> Iterable[str]:
    """Return the names of the recoveries."""
    from ovsprune.recovery import RECOVERIES

    return RECOVERIES.names()


def check_criterion(criterion: object) -> None:
    """Refuse what is neither a registered name nor a criterion."""
    from ovsprune.importance import find_criterion

    find_criterion(criterion)


def check_floor(floor: str) -> None:
    """Refuse a text that is not ``PATTERN=N``."""
    from ovsprune.pruning.floors import parse_floor

    parse_floor(floor)
