"""Towers of open_clip's ``TimmModel``: built by open_clip and timm, then narrowed.

Nothing of either is imported until a tower is asked for.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.slim.narrowing import build_narrowed
from ovsprune.slim.read import SlimCheckpoint

__all__ = [
    "build_timm_tower",
    "narrow_timm_tower",
    "timm_dense",
    "timm_head_outputs",
    "timm_pooled_and_dense",
]


def build_timm_tower(architecture: Mapping[str, Any]) -> nn.Module:
    """The dense tower that open_clip builds, with random weights from a fixed seed.

    Args:
        architecture: open_clip's model configuration, with ``timm_model_name`` in ``vision_cfg``.

    Raises:
        MissingLibraryError: open_clip or timm is not installed.
        CheckpointError: They cannot build it.
    """
    try:
        # by name, so that this room imports no framework until somebody asks for one
        model = importlib.import_module("open_clip.model")
        importlib.import_module("timm")
    except ImportError as error:
        raise MissingLibraryError(
            f"this tower is built by open_clip and timm ({error}); `pip install open_clip_torch "
            "timm`, or build it yourself and call ovsprune.apply"
        ) from error
    config = deepcopy(dict(architecture))
    try:
        config["vision_cfg"]["timm_model_pretrained"] = False
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            tower: nn.Module = model._build_vision_tower(
                config["embed_dim"], config["vision_cfg"], bool(config.get("quick_gelu"))
            )
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"the installed open_clip and timm cannot build this architecture ({error}); install "
            "the version of the library that the checkpoint's config names"
        ) from error
    return tower.eval().requires_grad_(False)


def narrow_timm_tower(checkpoint: SlimCheckpoint) -> nn.Module:
    """A tower of the widths of ``checkpoint``, without its weights.

    Raises:
        MissingLibraryError: open_clip or timm is not installed.
        CheckpointError: The config does not describe such a tower.
    """
    return build_narrowed(checkpoint, partial(build_timm_tower, checkpoint.spec.architecture))


def timm_dense(tower: nn.Module, images: Tensor) -> Tensor:
    """Embedding of each position, [B, 3, H, W] -> [B, C, h, w], not normalised."""
    return timm_pooled_and_dense(tower, images)[1]


def timm_pooled_and_dense(tower: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled [B, C] and dense [B, C, h, w] outputs of images [B, 3, H, W], in one pass."""
    trunk: Any = tower.trunk
    return timm_head_outputs(tower, trunk.forward_features(images))


def timm_head_outputs(tower: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled [B, C] and dense [B, C, h, w] outputs of the trunk's features.

    Each position goes through the head, norm and projection included, as the pooled features do:
    as a picture of one position, as FC-CLIP does (Yu et al. 2023). Where all of that is linear and
    the pooling a mean, the pooled output is the mean of the dense one; a norm or a projection of
    two layers behind the pooling makes them differ.

    Args:
        tower: open_clip's ``TimmModel``.
        features: [B, K, h, w], or [B, h, w, K] of a trunk whose ``output_fmt`` says so.
    """
    model: Any = tower
    axis = -1 if getattr(model.trunk, "output_fmt", "NCHW") == "NHWC" else 1
    pooled = model.head(model.trunk.forward_head(features))
    each = features.movedim(axis, -1)
    batch, height, width, channels = each.shape
    one = (channels, 1, 1) if axis == 1 else (1, 1, channels)
    positions = each.reshape(-1, *one)
    dense = model.head(model.trunk.forward_head(positions))
    return pooled, dense.view(batch, height, width, -1).movedim(-1, 1)
