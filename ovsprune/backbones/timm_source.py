"""Models of timm (``timm:NAME``) as open_clip's ``TimmModel``, and their weights.

The tower belongs to one of open_clip's families, as if open_clip's list contained the model.
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
"""Prefix of the name of a model of timm."""

_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
_MAX_EMBEDDING = 4096
"""A head with more outputs is taken for a classifier."""


def is_timm(name: str) -> bool:
    """Return True if ``name`` has the prefix of timm's models."""
    return name.startswith(PREFIX)


def prefixed(name: str) -> tuple[str, ...]:
    """Return ``name`` with the prefix if timm has such a model, as a suggestion for the user."""
    import timm

    return (f"{PREFIX}{name}",) if timm.is_model(name.partition(".")[0]) else ()


def timm_folder(name: str, tag: str | None = None, *, weights: bool = True) -> Folder:
    """Describe a model of timm as a folder in the format of open_clip, without a text tower.

    If the head computes an embedding (timm's CLIP towers), it is the projection. A classifier is
    removed, and the pooled features are the embedding. ``tag`` replaces that of the name; with
    neither, the weights are timm's default. With ``weights``, their file is downloaded if needed.

    Raises:
        UnknownNameError: timm has no such model.
        WeightsError: The tag is unknown, or its weights are not available.
    """
    import timm

    short, _, name_tag = name.removeprefix(PREFIX).partition(".")
    if not timm.is_model(short):
        raise UnknownNameError("model of timm's", short, timm.list_models())
    tag = tag or name_tag
    full_name = f"{short}.{tag}" if tag else short
    trunk = _trunk(full_name)
    config: Mapping[str, Any] = trunk.pretrained_cfg
    outputs = _embedding(config)
    # input_size is (channels, height, width)
    height, width = config["input_size"][1:]
    model = {
        "embed_dim": outputs or trunk.num_features,
        "vision_cfg": {
            "image_size": height if height == width else [height, width],
            "timm_model_name": short,
            "timm_model_pretrained": False,
            "timm_pool": _pool(trunk),
            # With "", open_clip uses the trunk's own head as the projection.
            "timm_proj": "" if outputs else "none",
        },
        "text_cfg": None,
    }
    preprocess = {
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
        "resize_mode": "squash" if config.get("crop_mode") == "squash" else "shortest",
    }
    label = tag or config.get("tag") or "timm"
    return Folder(
        path=Path(short),
        model=model,
        preprocess=preprocess,
        file=_file(short, label, config) if weights else None,
        label=label,
        renamed=lambda state: _renamed(full_name, outputs, state),
    )


def _trunk(name: str, **options: Any) -> Any:
    """Build a model of timm, on the meta device unless weights are loaded; check its tag."""
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


def _embedding(config: Mapping[str, Any]) -> int:
    """Return the outputs of a head that computes an embedding; 0 for a classifier or no head."""
    from timm.data.imagenet_info import infer_imagenet_subset

    outputs = int(config.get("num_classes") or 0)
    is_classifier = infer_imagenet_subset(dict(config)) is not None or outputs > _MAX_EMBEDDING
    return 0 if is_classifier else outputs


def _pool(trunk: nn.Module) -> str:
    """Return the pooling of a trunk, as an argument of ``timm.create_model``."""
    for owner in (trunk, getattr(trunk, "head", None)):
        pool = getattr(owner, "global_pool", None)
        # ConvNeXt's head has a pooling module, others a string.
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str) and pool:
            return pool
    return ""


def _file(short: str, tag: str, config: Mapping[str, Any]) -> Path:
    """Find or download the file of the weights."""
    subject = f"the weights {tag!r} of {PREFIX}{short}"
    repository = config.get("hf_hub_id")
    if not repository or config.get("custom_load"):
        raise WeightsError(
            f"{subject} are not published on the hub in a supported format; give a file of them "
            "(--pretrained PATH), another tag (--pretrained TAG), or --pretrained none"
        )
    file = config.get("hf_hub_filename")
    return hub_file(repository, [file] if file else _FILES, subject)


def _renamed(name: str, outputs: int, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename the tensors of a file to the names of the trunk in open_clip's ``TimmModel``.

    timm converts names of older versions. Names of open_clip, and unknown ones, stay as they are.
    """
    if any(".trunk." in f".{key}" for key in state):
        return state
    trunk = _trunk(name, num_classes=outputs)
    heads = trunk.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    classifier = () if outputs else tuple(f"{head}." for head in heads)
    tensors = {
        k: v for k, v in split(name, state, trunk).tower.items() if not k.startswith(classifier)
    }
    if tensors.keys() != trunk.state_dict().keys():
        tensors = _converted(name, outputs, classifier, state) or tensors
    return {f"trunk.{key}": value for key, value in tensors.items()}


def _converted(
    name: str, outputs: int, classifier: tuple[str, ...], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Load ``state`` with timm, which converts older formats; empty if timm cannot load it."""
    tensors = {k: v for k, v in state.items() if not k.startswith(classifier)}
    try:
        trunk = _trunk(
            name,
            pretrained=True,
            num_classes=outputs,
            # With another number of classes, timm would fill the head with random values.
            pretrained_cfg_overlay={"state_dict": tensors, "num_classes": outputs, "source": None},
        )
    except Exception:  # timm's filters do not check the format, and raise anything
        return {}
    return dict(trunk.state_dict())
