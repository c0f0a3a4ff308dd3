"""The whole CLIP of a slim checkpoint, as open_clip's own classes."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.slim.apply import apply
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.spec import CONFIG, MODEL, SlimSpec

__all__ = ["clip_class", "load_open_clip"]


def clip_class(open_clip: Any, config: Mapping[str, Any]) -> Any:
    """The class of which open_clip makes the model of a configuration, as its factory chooses."""
    if not (config.get("custom_text") or config["text_cfg"].get("hf_model_name")):
        return open_clip.CLIP
    return open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP


# What open_clip's transforms do in the versions in which they could not be told (2.16 to 2.20).
_OLD_TRANSFORM = {"interpolation": "bicubic", "resize_mode": "shortest"}


def load_open_clip(
    directory: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> tuple[Any, Any, Any]:
    """Load a slim CLIP with its text tower, as ``open_clip.create_model_and_transforms`` does.

    Args:
        directory: What ``ovsprune prune`` wrote.
        device: Where to.

    Returns:
        ``(model, preprocess_train, preprocess_val)``: an ``open_clip.CLIP`` in evaluation mode
        with a slim image tower, and open_clip's transforms from PIL picture to [3, H, W].

    Raises:
        CheckpointError: The checkpoint is damaged, has no text tower, or was not built by
            open_clip.
        MissingLibraryError: open_clip is not installed, or too old for the preprocessing.
    """
    checkpoint = read(directory)
    spec = checkpoint.spec
    config = copy.deepcopy(dict(spec.architecture))
    if not spec.library.startswith("open_clip") or "vision_cfg" not in config:
        raise CheckpointError(
            f"{checkpoint.path / CONFIG} was written for {spec.library}, not for open_clip; use "
            "ovsprune.load or ovsprune.apply"
        )
    if not checkpoint.text():
        raise CheckpointError(
            f"{checkpoint.path / MODEL} holds no text tower; prune again with it, or use "
            "ovsprune.load for the image tower alone"
        )
    try:
        # by name, so that this room imports no framework until somebody asks for one
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise MissingLibraryError(
            f"load_open_clip needs open_clip_torch {spec.library_version} or newer ({error}); "
            "`pip install open_clip_torch`, or use ovsprune.load, which needs no other library"
        ) from error
    model = _build(open_clip, config, checkpoint)
    train, val = (_transform(open_clip, spec, is_train) for is_train in (True, False))
    return model.to(device).eval(), train, val


def _transform(open_clip: Any, spec: SlimSpec, is_train: bool) -> Any:
    """open_clip's transform of the pictures, by what its version can be told.

    Raises:
        MissingLibraryError: This version cannot prepare pictures as the checkpoint wants them.
    """
    pre = spec.preprocess
    known = inspect.signature(open_clip.image_transform).parameters
    options = {"interpolation": pre.interpolation, "resize_mode": pre.resize_mode}
    for name, old in _OLD_TRANSFORM.items():
        if name not in known and options.pop(name) != old:
            raise MissingLibraryError(
                f"open_clip {_version()} prepares pictures with {name} {old!r} only, "
                f"the checkpoint wants {getattr(pre, name)!r}; install open_clip_torch "
                f"{spec.library_version} or newer, or use ovsprune.load"
            )
    return open_clip.image_transform(
        pre.size, is_train=is_train, mean=pre.mean, std=pre.std, **options
    )


def _version() -> str:
    """Of the installed open_clip; up to 2.24 its package itself does not say."""
    return str(importlib.import_module("open_clip.version").__version__)


def _build(open_clip: Any, config: dict[str, Any], checkpoint: SlimCheckpoint) -> Any:
    if config["text_cfg"].get("hf_model_name"):
        raise CheckpointError(
            f"{checkpoint.path / CONFIG}: the text tower is {config['text_cfg']['hf_model_name']} "
            "of a hub, which this ovsprune does not build; use open_clip's own model and "
            "ovsprune.apply on its .visual, or ovsprune.load for the image tower alone"
        )
    make = clip_class(open_clip, config)
    config.pop("custom_text", None)
    if checkpoint.spec.activation in ("gelu", "quick_gelu"):  # else the text tower's is another
        config["quick_gelu"] = checkpoint.spec.activation == "quick_gelu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path / CONFIG}: open_clip {_version()} cannot build "
            f"architecture ({error}); install {checkpoint.spec.library_version}, or use "
            "ovsprune.load"
        ) from error
    apply(model.visual, checkpoint)
    text = checkpoint.text()
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    wrong = [
        name
        for name in sorted(own.keys() | text.keys())
        if name not in own or name not in text or own[name].shape != text[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path / MODEL}: the text tower is not that of {CONFIG}, see "
            f"{', '.join(wrong[:4])}; copy or write the checkpoint again"
        )
    model.load_state_dict(text, strict=False)
    pre = checkpoint.spec.preprocess
    model.visual.image_mean, model.visual.image_std = pre.mean, pre.std
    return model
