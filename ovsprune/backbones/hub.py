"""Files on a hub: from the local cache, or fetched, or an error at once that names the ways out."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ovsprune.core.errors import WeightsError

__all__ = ["PREFIX", "cached", "first_line", "hub_file", "knock", "repository_of", "unreachable"]

PREFIX = "hf-hub:"
"""What a model's or weights' name starts with that is a repository on the hub."""

_PATIENCE = 5.0
"""Seconds that a hub has to answer before it counts as out of reach."""

_WAYS_OUT = (
    "--pretrained PATH with a local file (safetensors or a state dict), a cache copied from "
    "another machine (HF_HOME), or --pretrained none, which takes random weights and marks the "
    "result as untrained"
)


def repository_of(name: str) -> str | None:
    """``org/repo`` of ``hf-hub:org/repo``; None for any other name.

    Raises:
        WeightsError: What follows the prefix is no repository.
    """
    if not name.startswith(PREFIX):
        return None
    repository = name.removeprefix(PREFIX).strip("/")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise WeightsError(f"{name!r} names no repository of the hub; write {PREFIX}ORG/REPOSITORY")
    return repository


def cached(repository: str, names: Sequence[str]) -> Path | None:
    """The first of ``names`` that the local cache has of ``repository``."""
    import huggingface_hub

    for name in names:
        found = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def hub_file(repository: str, names: Sequence[str], what: str, ways_out: str = _WAYS_OUT) -> Path:
    """The first of ``names`` that ``repository`` has, from the local cache where it is there.

    Args:
        repository: ``org/repo``.
        names: Names of files, in order of preference.
        what: What is wanted of it, for messages.
        ways_out: What a user without a hub can do.

    Raises:
        WeightsError: Neither the cache nor the hub has one, or the hub is out of reach.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found = cached(repository, names)
    if found is not None:
        return found
    knock(constants.ENDPOINT, what, ways_out)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # the hub did not answer after all
            raise unreachable(what, first_line(error), ways_out) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # hub clients raise a family of their own, and OSError
            raise unreachable(what, first_line(error), ways_out) from error
    raise WeightsError(
        f"the repository {repository} on the hub has none of {', '.join(names)}, so it does not "
        f"give {what}; name another repository"
    )


def knock(address: str, what: str, ways_out: str = _WAYS_OUT) -> None:
    """Knock before a client does, which would try again and again for minutes.

    Raises:
        WeightsError: Nobody answers at ``address`` (a URL), or the hub is switched off.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise unreachable(what, "HF_HUB_OFFLINE is set", ways_out)
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_PATIENCE).close()
    except OSError as error:
        raise unreachable(what, f"{parts.hostname}: {error}", ways_out) from error


def unreachable(what: str, why: str, ways_out: str = _WAYS_OUT) -> WeightsError:
    """The error of something that is neither in the cache nor to be had."""
    return WeightsError(
        f"{what} are not in the local cache, and the hub that has them cannot be reached ({why}). "
        f"Ways out: {ways_out}."
    )


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
