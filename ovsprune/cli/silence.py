"""Keeps the logs and warnings of libraries off the screen; our own messages say what matters."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence

__all__ = ["silence_libraries", "users_environment", "verbose"]

DEBUG_VARIABLE = "OVSPRUNE_DEBUG"

# Read by the libraries when they are imported, which happens later.
_QUIET = {
    "HF_HUB_VERBOSITY": "critical",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_set_here: set[str] = set()


def verbose(arguments: Sequence[str]) -> bool:
    """Whether tracebacks, logs and warnings were asked for."""
    return "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def silence_libraries(debug: bool) -> None:
    """Keep logs and warnings off the screen, unless ``debug``.

    Raises nothing and changes no variable that the user has set.
    """
    if debug:
        return
    for name, value in _QUIET.items():
        if name not in os.environ:
            _set_here.add(name)
            os.environ[name] = value
    # open_clip logs on the root logger, which would set up printing on its first message.
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")


def users_environment() -> dict[str, str]:
    """The environment as the user gave it, for commands of the user's own."""
    return {name: value for name, value in os.environ.items() if name not in _set_here}
