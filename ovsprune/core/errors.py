"""Exceptions of the package: one base class, with a subclass per kind of error.

Every message states what was given, what was expected, where, and what to do next. The command
line prints the message and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "MissingLibraryError",
    "OptionError",
    "OutputError",
    "OvspruneError",
    "ScheduleError",
    "TargetError",
    "UnknownNameError",
    "WeightsError",
]


class OvspruneError(Exception):
    """Base class of every error that a user can cause and correct."""


class OptionError(OvspruneError, ValueError):
    """Option or argument outside its range, or two that contradict each other."""


class BudgetError(OvspruneError):
    """Budget that cannot be reached; the message names the nearest one that can."""


class CheckpointError(OvspruneError):
    """Slim or foreign checkpoint that is damaged, incomplete, or inconsistent."""


class WeightsError(OvspruneError):
    """Weights of a base model that cannot be loaded, or do not fit the named model."""


class DataError(OvspruneError):
    """Images, labels, or text embeddings that cannot be read or do not match."""


class ExportError(OvspruneError):
    """Tower that cannot be exported, or whose exported model computes something else."""


class OutputError(OvspruneError):
    """Output that exists already, or cannot be written."""


class TargetError(OvspruneError):
    """Framework's model that cannot take the slim tower or its mask; nothing was changed."""


class ScheduleError(OvspruneError):
    """Schedule that does not fit the model, the optimiser, or the resumed training."""


class MissingLibraryError(OvspruneError, ImportError):
    """Required library that is not installed; the message names it and its version."""


# LookupError and not KeyError: str() of a KeyError shows its message in quotes.
class UnknownNameError(OvspruneError, LookupError):
    """Unknown name of a plug-in or value.

    Args:
        kind: Kind of plug-in or value, for example ``"criterion"``.
        name: The unknown name.
        known: The names that are accepted.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind = kind
        self.name = name
        self.known = tuple(sorted(known))
        self.closest = tuple(difflib.get_close_matches(name, self.known, n=3, cutoff=0.5))
        hint = f" Did you mean {' or '.join(map(repr, self.closest))}?" if self.closest else ""
        listed = ", ".join(self.known) if len(self.known) <= 40 else f"{len(self.known)} names"
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {listed or 'none'}.")
