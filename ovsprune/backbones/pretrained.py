"""Where open_clip's weights come from: its cache, the hub, or a file."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ovsprune.core.errors import WeightsError

__all__ = ["OPENAI_EXTRAS", "default_tag", "fit", "read_state", "resolve"]

OPENAI_EXTRAS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Entries of OpenAI's own state dicts that are no weights."""

_PATIENCE = 5.0
"""Seconds that a hub has to answer before it counts as out of reach."""


def default_tag(name: str) -> str:
    """The tag that is meant when none is given: OpenAI's.

    Raises:
        WeightsError: OpenAI released none for ``name``; the message lists the tags there are.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if "openai" in tags:
        return "openai"
    base = name.removesuffix("-quickgelu")
    raise WeightsError(
        f"{name} has no weights of OpenAI's, so there is no default. Give --pretrained with one of "
        f"its tags ({', '.join(tags) or 'none are known'}), a file, or 'none' for random weights."
        + (f" (Tags of {base} are for {base}.)" if base != name and not tags else "")
    )


def resolve(name: str, tag: str) -> tuple[Path, dict[str, Any]]:
    """The file that open_clip would load for a tag, and the tag's own configuration.

    The local cache is looked at first, so that a machine without a network never waits for one.

    Raises:
        WeightsError: No such tag, or neither the cache nor the hub has the file.
    """
    import open_clip
    from open_clip import pretrained as registry

    config = registry.get_pretrained_cfg(name, tag)
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise WeightsError(
            f"{tag!r} is neither a file nor a tag of {name}. Tags: {', '.join(tags) or 'none'}."
        )
    cached = _cached(config)
    if cached is None:
        _check_hub(name, tag, config)
        try:
            cached = Path(registry.download_pretrained(config))
        except Exception as error:  # Hub clients raise a family of their own, and OSError.
            raise _unreachable(name, tag, _first_line(error)) from error
    return cached, dict(config)


def _cached(config: Mapping[str, Any]) -> Path | None:
    import huggingface_hub
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, _, file = config.get("hf_hub", "").rpartition("/")
    if not repository:
        return None
    names = [file.rsplit(".", 1)[0] + ".safetensors", file] if file else []
    for candidate in names or [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]:
        found = huggingface_hub.try_to_load_from_cache(repository, candidate)
        if isinstance(found, str):
            return Path(found)
    return None


def _check_hub(name: str, tag: str, config: Mapping[str, Any]) -> None:
    """Knock before a client does, which would try again and again for minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _unreachable(name, tag, "HF_HUB_OFFLINE is set")
    address = urlsplit(constants.ENDPOINT if config.get("hf_hub") else config.get("url", ""))
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_PATIENCE).close()
    except OSError as error:
        raise _unreachable(name, tag, f"{address.hostname}: {error}") from error


def _unreachable(name: str, tag: str, why: str) -> WeightsError:
    return WeightsError(
        f"the weights {tag!r} of {name} are not in the local cache, and the hub that has them "
        f"cannot be reached ({why}). Ways out: --pretrained PATH with a local file (safetensors or "
        "a state dict), a cache copied from another machine (HF_HOME), or --pretrained none, which "
        "takes random weights and marks the result as untrained."
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict from safetensors or a plain ``.pt``, ``.pth``, ``.bin``; nothing is unpickled.

    A ``state_dict`` entry around it and a ``module.`` prefix are taken off.

    Raises:
        WeightsError: The file is damaged, or no state dict of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as weights: {_first_line(error)}. Give a safetensors "
            "file, or a state dict saved by torch.save (TorchScript archives and pickled models "
            "are not opened: save their state_dict() first)."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(v, Tensor) for v in found.values()):
        raise WeightsError(f"{path} holds no state dict of tensors")
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return {k: v for k, v in state.items() if k not in OPENAI_EXTRAS}


def fit(name: str, path: Path | str, state: Mapping[str, Tensor], model: torch.nn.Module) -> None:
    """Load ``state`` into ``model``, all of it or nothing.

    Raises:
        WeightsError: Keys are missing, unexpected or of other shapes; names the first few of each.
    """
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in state]
    unexpected = [k for k in state if k not in wanted]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(faults.values()):
        said = "; ".join(
            f"{len(v)} {kind} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})"
            for kind, v in faults.items()
            if v
        )
        raise WeightsError(f"{path} does not fit {name}: {said}. Is it another model's file?")
    model.load_state_dict({k: v.to(wanted[k].dtype) for k, v in state.items()})


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
