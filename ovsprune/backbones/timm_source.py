"""Models of timm's by ``timm:NAME``: how open_clip's ``TimmModel`` builds them, and their weights.

The tower is one of open_clip's families, so what can be cut of a trunk does not depend on the way
in which it was named.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.backbones.fitting import split
from ovsprune.backbones.hub import hub_file
from ovsprune.backbones.open_clip_folder import Folder
from ovsprune.core.errors import UnknownNameError, WeightsError

__all__ = ["PREFIX", "is_timm", "prefixed", "timm_folder"]

PREFIX = "timm:"
"""What a model's name starts with that is one of timm's."""

_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
_WIDEST_EMBEDDING = 4096
"""A head of more outputs is a classifier, of whichever labels."""


def is_timm(name: str) -> bool:
    """Whether ``name`` means a model of timm's."""
    return name.startswith(PREFIX)


def prefixed(name: str) -> tuple[str, ...]:
    """``name`` with the prefix, if timm has a model of that name; to be proposed to a user."""
    import timm

    return (f"{PREFIX}{name}",) if timm.is_model(name.partition(".")[0]) else ()


def timm_folder(name: str, tag: str | None = None, *, weights: bool = True) -> Folder:
    """What timm knows of a model, in the form of a folder of open_clip's without a text tower.

    A head that makes an embedding (of timm's CLIP towers) is the projection. A classifier is left
    off, and what the trunk pools is the embedding.

    Args:
        name: ``timm:NAME`` or ``timm:NAME.TAG``.
        tag: Of the weights, in place of that of the name; with neither, timm's default.
        weights: Whether the weights are wanted, too: from the hub's cache, or fetched.

    Raises:
        UnknownNameError: timm has no such model.
        WeightsError: There is no such tag, or its weights cannot be had.
    """
    import timm

    short, _, own = name.removeprefix(PREFIX).partition(".")
    if not timm.is_model(short):
        raise UnknownNameError("model of timm's", short, timm.list_models())
    tag = tag or own
    trunk = _trunk(f"{short}.{tag}" if tag else short)
    said: Mapping[str, Any] = trunk.pretrained_cfg
    outputs = _embedding(said)
    height, width = said["input_size"][1:]
    model = {
        "embed_dim": outputs or trunk.num_features,
        "vision_cfg": {
            "image_size": height if height == width else [height, width],
            "timm_model_name": short,
            "timm_model_pretrained": False,
            "timm_pool": _pool(trunk),
            # With "" open_clip takes the trunk's own head as the projection.
            "timm_proj": "" if outputs else "none",
        },
        "text_cfg": None,
    }
    preprocess = {
        "mean": said["mean"],
        "std": said["std"],
        "interpolation": said["interpolation"],
        "resize_mode": "squash" if said.get("crop_mode") == "squash" else "shortest",
    }
    label = tag or said.get("tag") or "timm"
    return Folder(
        Path(short),
        model,
        preprocess,
        label=label,
        file=_file(short, label, said) if weights else None,
        renamed=lambda state: _of_trunk(f"{short}.{tag}" if tag else short, outputs, state),
    )


def _trunk(name: str, **options: Any) -> Any:
    """A model of timm's, without weights and on the meta device unless ``options`` bring them.

    Raises:
        WeightsError: There is no such tag.
    """
    import timm

    short, _, tag = name.partition(".")
    tags = {known.partition(".")[2] for known in timm.list_pretrained(f"{short}.*")}
    if tag and tag not in tags:
        raise WeightsError(
            f"{tag!r} is neither a file nor a tag of timm's {short}. "
            f"Tags: {', '.join(sorted(tags)) or 'none'}."
        )
    with torch.device("cpu" if options.get("pretrained") else "meta"):
        return timm.create_model(name, **options)


def _embedding(said: Mapping[str, Any]) -> int:
    """Outputs of a head that makes an embedding; 0 without one, and for a classifier's."""
    from timm.data.imagenet_info import infer_imagenet_subset

    outputs = int(said.get("num_classes") or 0)
    labels = infer_imagenet_subset(dict(said)) is not None or outputs > _WIDEST_EMBEDDING
    return 0 if labels else outputs


def _pool(trunk: nn.Module) -> str:
    """How a trunk pools by itself, in the word that open_clip hands to timm."""
    for owner in (trunk, getattr(trunk, "head", None)):
        pool = getattr(owner, "global_pool", None)
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str) and pool:
            return pool
    return ""


def _file(short: str, tag: str, said: Mapping[str, Any]) -> Path:
    what = f"the weights {tag!r} of {PREFIX}{short}"
    repository = said.get("hf_hub_id")
    if not repository or said.get("custom_load"):
        raise WeightsError(
            f"{what} are not published on the hub in a form that can be read here; give a file of "
            "them (--pretrained PATH), another tag (--pretrained TAG), or --pretrained none"
        )
    named = said.get("hf_hub_filename")
    return hub_file(repository, [named] if named else _FILES, what)


def _of_trunk(name: str, outputs: int, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state`` of a file by the names that the trunk has in open_clip's ``TimmModel``.

    What has other names than timm's of today is given to timm's own conversion. State of open_clip
    itself, and what nothing can be made of, stays as it is.
    """
    if any(".trunk." in f".{key}" for key in state):
        return state
    trunk = _trunk(name, num_classes=outputs)
    heads = trunk.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    left_off = () if outputs else tuple(f"{head}." for head in heads)
    own = {k: v for k, v in split(name, state, trunk).tower.items() if not k.startswith(left_off)}
    if own.keys() != trunk.state_dict().keys():
        own = _converted(name, outputs, left_off, state) or own
    return {f"trunk.{key}": value for key, value in own.items()}


def _converted(
    name: str, outputs: int, left_off: tuple[str, ...], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What timm's own loading makes of ``state``; empty if it is none of its model's forms."""
    given = {k: v for k, v in state.items() if not k.startswith(left_off)}
    try:
        trunk = _trunk(
            name,
            pretrained=True,
            num_classes=outputs,
            # as many outputs as the file is said to have: else timm fills gaps with random values
            pretrained_cfg_overlay={"state_dict": given, "num_classes": outputs, "source": None},
        )
    except Exception:  # a filter for another form fails as it likes
        return {}
    return dict(trunk.state_dict())
