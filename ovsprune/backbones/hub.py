"""Files of a model hub, from the local cache or downloaded."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ovsprune.core.errors import WeightsError

__all__ = [
    "PREFIX",
    "cached",
    "check_reachable",
    "first_line",
    "hub_file",
    "repository_of",
    "unreachable",
]

PREFIX = "hf-hub:"
"""Prefix of the name of a model or of weights in a repository on the hub."""

_TIMEOUT = 5.0
"""Seconds to wait for a connection to the hub."""

_REMEDY = (
    "--pretrained PATH with a local file (safetensors or a state dict), a cache copied from "
    "another machine (HF_HOME), or --pretrained none, which takes random weights and marks the "
    "result as untrained"
)


def repository_of(name: str) -> str | None:
    """Return ``org/repo`` of ``hf-hub:org/repo``; None for any other name.

    Raises:
        WeightsError: The text after the prefix is not the name of a repository.
    """
    if not name.startswith(PREFIX):
        return None
    repository = name.removeprefix(PREFIX).strip("/")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise WeightsError(f"{name!r} names no repository of the hub; write {PREFIX}ORG/REPOSITORY")
    return repository


def cached(repository: str, names: Sequence[str]) -> Path | None:
    """Return the first of the files ``names`` of a repository in the local cache, or None."""
    import huggingface_hub

    for name in names:
        path = huggingface_hub.try_to_load_from_cache(repository, name)
        # the hub's client returns a sentinel object for a file known to be absent
        if isinstance(path, str):
            return Path(path)
    return None


def hub_file(repository: str, names: Sequence[str], subject: str, remedy: str = _REMEDY) -> Path:
    """Return the first of several files that a repository has, preferably from the local cache.

    Args:
        repository: ``org/repo``.
        names: Names of the files, in order of preference.
        subject: Description of the file in the plural, for messages (``"the weights of ..."``).
        remedy: Alternatives for a user without a hub, for messages.

    Raises:
        WeightsError: Neither the cache nor the hub has a file, or the hub cannot be reached.
    """
    # Imported at the first use: weights from local files need no hub client.
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path = cached(repository, names)
    if path is not None:
        return path
    check_reachable(constants.ENDPOINT, subject, remedy)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except Exception as error:  # the hub's client does not document what it raises
            # LocalEntryNotFoundError is an EntryNotFoundError, but means that the hub failed.
            missing = isinstance(error, EntryNotFoundError)
            if not missing or isinstance(error, LocalEntryNotFoundError):
                raise unreachable(subject, first_line(error), remedy) from error
    raise WeightsError(
        f"the repository {repository} on the hub has none of {', '.join(names)}, so it does not "
        f"give {subject}; name another repository"
    )


def check_reachable(address: str, subject: str, remedy: str = _REMEDY) -> None:
    """Check that the server of a URL accepts connections: the client would retry for minutes.

    Raises:
        WeightsError: No connection is possible, or ``HF_HUB_OFFLINE`` is set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise unreachable(subject, "HF_HUB_OFFLINE is set", remedy)
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_TIMEOUT).close()
    except OSError as error:
        raise unreachable(subject, f"{parts.hostname}: {error}", remedy) from error


def unreachable(subject: str, reason: str, remedy: str = _REMEDY) -> WeightsError:
    """Return the error for files that are neither in the cache nor available from the hub."""
    return WeightsError(
        f"{subject} are not in the local cache, and the hub that has them cannot be reached "
        f"({reason}). Use instead: {remedy}."
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    # an error without arguments has an empty message
    return next(iter(str(error).splitlines()), type(error).__name__)
