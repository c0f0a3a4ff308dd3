"""Measures ``tiny``: dense zero-shot mIoU, and mIoU over combinations that training never showed.

    python benchmarks/tiny_clip/evaluate.py

Reads the model the way open_clip does, from the package's folder, and writes ``results.json``
beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from export import TINY
from model import encode_dense
from open_clip.model import CLIP

from ovsprune.core.records import Preprocess
from ovsprune.evaluation import DenseZeroShot, ScenesData, SegmentationData, encode_names, evaluate


def score(
    model: CLIP, preprocess: Preprocess, tokenize: Any, data: SegmentationData
) -> dict[str, Any]:
    """Scores one data set with the prompt "a photo of a {name}"."""
    embeddings = encode_names(data.prompts, model.encode_text, tokenize)
    head = DenseZeroShot(lambda images: encode_dense(model, images)[1], embeddings, preprocess)
    found = evaluate(head, data, batch_size=16)
    return {
        "miou": found.scores.miou,
        "pixel_accuracy": found.scores.pixel_accuracy,
        "images": found.images,
        "seconds": round(found.seconds, 1),
        "per_class": found.scores.per_class,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures tiny")
    parser.add_argument("--folder", type=Path, default=TINY)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results.json"))
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    config = json.loads((chosen.folder / "open_clip_config.json").read_text())
    cfg = config["preprocess_cfg"]
    size = config["model_cfg"]["vision_cfg"]["image_size"]
    preprocess = Preprocess(
        (size, size), tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"]
    )
    name = f"local-dir:{chosen.folder}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    tokenize = open_clip.get_tokenizer(name)
    model.eval()
    pair = ScenesData(chosen.scenes, split="combinations", combinations=True)
    record = {
        "model": "tiny",
        "scenes": chosen.scenes,
        "prompt": "a photo of a {name}",
        "date": time.strftime("%Y-%m-%d"),
        "classes": score(model, preprocess, tokenize, ScenesData(chosen.scenes, split="test")),
        "combinations": score(model, preprocess, tokenize, pair),
    }
    chosen.json.write_text(json.dumps(record, indent=2) + "\n")
    for key in ("classes", "combinations"):
        print(f"{key}: mIoU {100 * record[key]['miou']:.2f} over {record[key]['images']} scenes")


if __name__ == "__main__":
    main()
