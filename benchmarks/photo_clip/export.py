"""Makes the folder of ``photo`` from a checkpoint of the training.

    python benchmarks/photo_clip/export.py --checkpoint DIR/final.pt

Writes fp16 weights of the image tower and the configuration, in the form that open_clip reads from
a ``local-dir:``. The text tower is not saved: it was never trained.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from model import MODEL_CFG, PREPROCESS_CFG
from safetensors.torch import save_file

PHOTO = Path(__file__).resolve().parent / "photo"


def export(checkpoint: Path, folder: Path) -> Path:
    """Writes configuration and weights.

    Args:
        checkpoint: a checkpoint of ``train.py``.
        folder: where the files go.

    Returns:
        The weights' file.
    """
    state = torch.load(checkpoint, weights_only=True)
    tensors = {
        name.removeprefix("clip."): tensor.half().contiguous()
        for name, tensor in state["model"].items()
        if name.startswith("clip.visual.")
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = folder / "open_clip_model.safetensors"
    partial = weights.with_suffix(".part")
    notes = {"format": "pt", "step": str(state["step"]), "settings": json.dumps(state["settings"])}
    save_file(tensors, partial, notes)
    partial.chmod(0o644)
    os.replace(partial, weights)
    print(f"{weights}: step {state['step']}, {weights.stat().st_size / 1e6:.1f} MB")
    return weights


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Exports a checkpoint of photo")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=PHOTO)
    chosen = parser.parse_args(arguments)
    export(chosen.checkpoint, chosen.folder)


if __name__ == "__main__":
    main()
