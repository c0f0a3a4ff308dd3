"""What a fresh process does with a row's slim tower: load it, and write its outputs beside it.

    registry_load.py FOLDER [few]

It imports nothing but ovsprune; what else is needed, the checkpoint's builder brings.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import ovsprune
from ovsprune.slim.hashing import state_hashes


def main(folder: Path, built: AbstractContextManager[None]) -> None:
    """Load ``folder/slim`` where towers are built as in ``built``."""
    images = load_file(folder / "images.safetensors")["images"]
    with built, torch.no_grad():
        slim = ovsprune.load(folder / "slim")
        found = {"pooled": slim(images), "dense": slim.dense(images)}
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "out.safetensors")
    (folder / "hashes.json").write_text(json.dumps(state_hashes(slim.tower.state_dict())))


if __name__ == "__main__":
    if sys.argv[2:] == ["few"]:
        from registry_one import shortened

        main(Path(sys.argv[1]), shortened(True))
    else:
        main(Path(sys.argv[1]), nullcontext())
