"""Load a slim checkpoint with its text tower, as a model of open_clip's classes."""

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
from ovsprune.slim.load import shape_mismatches
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.spec import CONFIG, MODEL, SlimSpec

__all__ = ["clip_class", "load_open_clip"]


def clip_class(open_clip: Any, config: Mapping[str, Any]) -> Any:
    """Return the class that open_clip's factory uses for a model configuration."""
    if not (config.get("custom_text") or config["text_cfg"].get("hf_model_name")):
        return open_clip.CLIP
    return open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP


# Settings that the transforms of open_clip 2.16 to 2.20 use and that cannot be changed there.
_FIXED_TRANSFORM = {"interpolation": "bicubic", "resize_mode": "shortest"}


def load_open_clip(
    directory: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> tuple[Any, Any, Any]:
    """Load a slim CLIP with its text tower, as ``open_clip.create_model_and_transforms`` does.

    Args:
        directory: Slim checkpoint, written by ``ovsprune prune``.
        device: Device of the model.

    Returns:
        ``(model, preprocess_train, preprocess_val)``: an ``open_clip.CLIP`` in evaluation mode
        with a slim image tower, and open_clip's transforms from a PIL image to [3, H, W].

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
            f"{checkpoint.path / MODEL} holds no text tower; prune the model again with its "
            "text tower, or load the image tower alone with ovsprune.load"
        )
    try:
        # imported by name: ovsprune.slim must not depend on a framework
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
    """Build open_clip's image transform with the preprocessing of the checkpoint."""
    pre = spec.preprocess
    accepted = inspect.signature(open_clip.image_transform).parameters
    options = {"interpolation": pre.interpolation, "resize_mode": pre.resize_mode}
    for name, fixed in _FIXED_TRANSFORM.items():
        if name not in accepted and options.pop(name) != fixed:
            raise MissingLibraryError(
                f"open_clip {_version()} preprocesses images with {name} {fixed!r} only, "
                f"the checkpoint needs {getattr(pre, name)!r}; install open_clip_torch "
                f"{spec.library_version} or newer, or use ovsprune.load"
            )
    return open_clip.image_transform(
        pre.size, is_train=is_train, mean=pre.mean, std=pre.std, **options
    )


def _version() -> str:
    """Return the version of open_clip; up to 2.24 the package has no ``__version__``."""
    return str(importlib.import_module("open_clip.version").__version__)


def _build(open_clip: Any, config: dict[str, Any], checkpoint: SlimCheckpoint) -> Any:
    """Build the model with open_clip and load the weights of both towers."""
    if config["text_cfg"].get("hf_model_name"):
        raise CheckpointError(
            f"{checkpoint.path / CONFIG}: the text tower is the Hugging Face model "
            f"{config['text_cfg']['hf_model_name']}, which this ovsprune cannot build; build the "
            "model with open_clip and call ovsprune.apply on its .visual, or load the image tower "
            "alone with ovsprune.load"
        )
    make = clip_class(open_clip, config)
    config.pop("custom_text", None)
    # With any other activation in the image tower, the config already holds the text tower's.
    if checkpoint.spec.activation in ("gelu", "quick_gelu"):
        config["quick_gelu"] = checkpoint.spec.activation == "quick_gelu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path / CONFIG}: open_clip {_version()} cannot build "
            f"this architecture ({error}); install open_clip_torch "
            f"{checkpoint.spec.library_version}, or load the image tower alone with ovsprune.load"
        ) from error
    apply(model.visual, checkpoint)  # open_clip built a dense image tower
    text = checkpoint.text()
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    wrong = shape_mismatches(text, expected)
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path / MODEL}: the text tower does not fit the architecture in {CONFIG} "
            f"({', '.join(wrong[:4])}); copy the checkpoint again, or write it again from the "
            "pruned model"
        )
    # Not strict: the image tower has its weights already, and text has none of them.
    model.load_state_dict(text, strict=False)
    pre = checkpoint.spec.preprocess
    model.visual.image_mean, model.visual.image_std = pre.mean, pre.std
    return model
