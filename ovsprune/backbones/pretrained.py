"""Which weights a name and a tag mean: the tags of open_clip, and repositories on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovsprune.backbones.hub import cached, first_line, knock, repository_of, unreachable
from ovsprune.backbones.open_clip_folder import hub_folder
from ovsprune.core.errors import WeightsError

__all__ = ["default_tag", "resolve"]


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

    Args:
        name: open_clip's name.
        tag: One of its tags, or ``hf-hub:org/repo``.

    Returns:
        The file, and ``mean``, ``std``, ``quick_gelu`` and so on; what is missing has open_clip's
        default.

    Raises:
        WeightsError: No such tag, or neither the cache nor the hub has the file.
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
    found = _cached(config)
    if found is None:
        from huggingface_hub import constants

        what = f"the weights {tag!r} of {name}"
        knock(constants.ENDPOINT if config.get("hf_hub") else config.get("url", ""), what)
        try:
            found = Path(registry.download_pretrained(config))
        except Exception as error:  # hub clients raise a family of their own, and OSError
            raise unreachable(what, first_line(error)) from error
    return found, dict(config)


def _cached(config: Mapping[str, Any]) -> Path | None:
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, _, file = config.get("hf_hub", "").rpartition("/")
    if not repository:
        return None
    names = [file.rsplit(".", 1)[0] + ".safetensors", file] if file else []
    return cached(repository, names or [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME])
