"""Identity of a comparison and of its rows: values that a reusable stored row has in common."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovsprune._version import __version__
from ovsprune.calibration.pictures import RENDERED, folder_fingerprint
from ovsprune.comparison.methods import Method
from ovsprune.comparison.results import KEY
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.datasets import FolderData, SegmentationData
from ovsprune.pruning.config import PruneConfig
from ovsprune.slim.hashing import tensor_hash

__all__ = ["comparison_identity", "made_by", "row_key"]


def comparison_identity(
    backbone: Backbone,
    config: PruneConfig,
    embeddings: Tensor,
    images: SegmentationData,
    *,
    data: str | Path | None,
    list_file: str | Path | None,
    centred: bool,
    device: str,
) -> dict[str, Any]:
    """Return everything that a row depends on besides method, ratio and seed, as JSON values."""
    # One type for all, integer buffers included, because they are concatenated below.
    weights = [p.detach().flatten().float().cpu() for p in backbone.tower.state_dict().values()]
    calibration = config.calibration
    # A folder may change under the same path.
    fingerprints: dict[str, str] = {}
    if isinstance(images, FolderData):
        fingerprints["labelled pictures"] = images.fingerprint()
    if calibration not in RENDERED:
        fingerprints["calibration pictures"] = folder_fingerprint(Path(calibration))
        # Absolute, so that a comparison can be resumed from another directory.
        calibration = str(Path(calibration).resolve())
    return {
        "model": backbone.name,
        "pretrained": backbone.pretrained,
        "tower": tensor_hash(torch.cat(weights))[:16],
        "embeddings": tensor_hash(embeddings)[:16],
        "data": "scenes" if data is None else str(Path(data).resolve()),
        "list": None if list_file is None else str(list_file),
        "images": len(images),
        "calibration": calibration,
        "samples": config.pictures,
        "device": str(device),
        **fingerprints,
        **_changed_options(config, centred),
    }


def _changed_options(config: PruneConfig, centred: bool) -> dict[str, Any]:
    """Return the options that differ from the defaults.

    Defaults are left out, so that rows that were made before an option existed stay valid.
    """
    defaults = PruneConfig(ratio=config.ratio)
    values = {name: getattr(config, name) for name in ("budget", "protect", "round_to")}
    changed = {name: value for name, value in values.items() if value != getattr(defaults, name)}
    return {**changed, **({"centred": True} if centred else {})}


def made_by() -> str:
    """Return the versions of the libraries that may change a row."""
    torch_pruning = version("torch-pruning")
    return f"ovsprune {__version__}, torch {torch.__version__}, torch-pruning {torch_pruning}"


def row_key(seed: int, ratio: float, method: Method) -> dict[str, Any]:
    """Return the values that identify a row of a comparison."""
    parts = (method.criterion, method.allocation, method.recovery, method.source)
    return dict(zip(KEY, (method.name, ratio, seed, *parts), strict=True))
