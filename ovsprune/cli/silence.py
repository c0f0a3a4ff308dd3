"""Suppression of logs and warnings of libraries."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence

__all__ = ["silence_libraries", "users_environment", "verbose"]

DEBUG_VARIABLE = "OVSPRUNE_DEBUG"

# Environment variables that the libraries read when they are imported, later.
_QUIET = {
    "HF_HUB_VERBOSITY": "critical",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # otherwise a fork prints a warning
}

# Variables that silence_libraries has set, in contrast to those of the user.
_added: set[str] = set()


def verbose(arguments: Sequence[str]) -> bool:
    """Return True if tracebacks, logs and warnings are requested."""
    return "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def silence_libraries(debug: bool) -> None:
    """Suppress logs and warnings unless ``debug``; keep variables that the user has set."""
    if debug:
        return
    for name, value in _QUIET.items():
        if name not in os.environ:
            _added.add(name)
            os.environ[name] = value
    # open_clip logs on the root logger, whose first message would install a handler that prints.
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")


def users_environment() -> dict[str, str]:
    """Return the environment without the variables set here, for commands of the user."""
    return {name: value for name, value in os.environ.items() if name not in _added}
