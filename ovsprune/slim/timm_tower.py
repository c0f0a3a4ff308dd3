"""Towers of open_clip's ``TimmModel``: built by open_clip and timm, then narrowed.

Neither library is imported before a tower is built.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, MissingLibraryError

__all__ = ["build_timm_tower", "timm_head_outputs", "timm_pooled_and_dense"]


def build_timm_tower(architecture: Mapping[str, Any]) -> nn.Module:
    """Build the dense tower with open_clip, with random weights from a fixed seed.

    Args:
        architecture: open_clip's model configuration, with ``timm_model_name`` in ``vision_cfg``.

    Raises:
        MissingLibraryError: open_clip or timm is not installed.
        CheckpointError: The installed versions cannot build the architecture.
    """
    try:
        # imported by name: ovsprune.slim must not depend on a framework
        model = importlib.import_module("open_clip.model")
        importlib.import_module("timm")
    except ImportError as error:
        raise MissingLibraryError(
            f"building this tower needs open_clip and timm ({error}); `pip install open_clip_torch "
            "timm`, or build the tower yourself and call ovsprune.apply"
        ) from error
    # The line below changes a nested dict, which belongs to the caller.
    config = deepcopy(dict(architecture))
    try:
        config["vision_cfg"]["timm_model_pretrained"] = False  # no download
        # The caller's random state stays as it was; devices=[] leaves GPUs out.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            tower: nn.Module = model._build_vision_tower(
                config["embed_dim"], config["vision_cfg"], bool(config.get("quick_gelu"))
            )
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"the installed open_clip and timm cannot build this architecture ({error}); install "
            "the library version that the config of the checkpoint names"
        ) from error
    return tower.eval().requires_grad_(False)


def timm_pooled_and_dense(tower: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute pooled [B, C] and dense [B, C, h, w] outputs of images [B, 3, H, W] in one pass."""
    trunk: Any = tower.trunk
    return timm_head_outputs(tower, trunk.forward_features(images))


def timm_head_outputs(tower: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute pooled [B, C] and dense [B, C, h, w] outputs from the features of the trunk.

    For the dense output each position passes through the head (norm and projection included) as
    an image of one position, as in FC-CLIP (Yu et al., NeurIPS 2023). If the head is linear and
    the pooling a mean, the pooled output equals the mean of the dense output. A norm or a
    two-layer projection after the pooling makes them differ.

    Args:
        tower: open_clip's ``TimmModel``.
        features: [B, K, h, w], or [B, h, w, K] if ``output_fmt`` of the trunk is ``"NHWC"``.
    """
    model: Any = tower
    axis = -1 if getattr(model.trunk, "output_fmt", "NCHW") == "NHWC" else 1
    pooled = model.head(model.trunk.forward_head(features))
    features = features.movedim(axis, -1)  # [B, h, w, K]
    batch, height, width, channels = features.shape
    single = (channels, 1, 1) if axis == 1 else (1, 1, channels)
    positions = features.reshape(-1, *single)  # [B * h * w, K, 1, 1] or [B * h * w, 1, 1, K]
    dense = model.head(model.trunk.forward_head(positions))  # [B * h * w, C]
    return pooled, dense.view(batch, height, width, -1).movedim(-1, 1)
