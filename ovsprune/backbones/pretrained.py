"""Weights of open_clip's models: the tags of open_clip, and repositories on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovsprune.backbones.hub import (
    cached,
    check_reachable,
    first_line,
    repository_of,
    unreachable,
)
from ovsprune.backbones.open_clip_folder import hub_folder
from ovsprune.core.errors import WeightsError

__all__ = ["default_tag", "resolve"]


def default_tag(name: str) -> str:
    """Return the default tag of a model, OpenAI's.

    Raises:
        WeightsError: OpenAI released no weights for ``name``; the message lists the existing tags.
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
    """Return the file that open_clip loads for a tag, and the configuration of the tag.

    ``tag`` can also be ``hf-hub:org/repo``. The configuration has ``mean``, ``std``, ``quick_gelu``
    and others; missing entries have open_clip's default.

    Raises:
        WeightsError: The tag is unknown, or neither the cache nor the hub has the file.
    """
    import open_clip
    from open_clip import pretrained as registry

    repository = repository_of(tag)
    if repository is not None:
        folder = hub_folder(repository)
        return folder.weights, {
            **folder.preprocess,
            "quick_gelu": bool(folder.model.get("quick_gelu", False)),
        }
    config = registry.get_pretrained_cfg(name, tag)
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise WeightsError(
            f"{tag!r} is neither a file nor a tag of {name}. Tags: {', '.join(tags) or 'none'}."
        )
    # The cache comes first, so that a machine without a network does not wait for one.
    path = _cached(config)
    if path is None:
        from huggingface_hub import constants

        subject = f"the weights {tag!r} of {name}"
        address = constants.ENDPOINT if config.get("hf_hub") else config.get("url", "")
        check_reachable(address, subject)
        try:
            path = Path(registry.download_pretrained(config))
        except Exception as error:  # the hub's client does not document what it raises
            raise unreachable(subject, first_line(error)) from error
    return path, dict(config)


def _cached(config: Mapping[str, Any]) -> Path | None:
    """Return the cached file of a tag; ``hf_hub`` is ``org/repo/`` or ``org/repo/file``."""
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, _, file = config.get("hf_hub", "").rpartition("/")
    if not repository:
        return None
    names = [file.rsplit(".", 1)[0] + ".safetensors", file] if file else []
    return cached(repository, names or [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME])
