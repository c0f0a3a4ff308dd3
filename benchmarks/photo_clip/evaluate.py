"""Measures ``photo``: dense mIoU on MSRC test and CamVid val, with a bootstrap interval.

    python benchmarks/photo_clip/evaluate.py --data DATA

Writes ``results.json`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from export import PHOTO

from ovsprune.backbones import load_backbone
from ovsprune.evaluation import DenseZeroShot, FolderData, evaluate
from ovsprune.evaluation.bootstrap import bootstrap_miou
from ovsprune.evaluation.text import read_embeddings

SETS = {"msrc_test": ("msrc", "test.txt"), "camvid_val": ("camvid/val", None)}
"""Data sets that the training never opened: folder, and list of stems."""


def score(model: str, data: Path, centred: bool) -> dict[str, Any]:
    """Scores of both data sets.

    Args:
        model: Folder of a model or slim checkpoint.
        data: Folder of the photographs.
        centred: Whether the mean of the embeddings is taken off them first.
    """
    backbone = load_backbone(model)
    found: dict[str, Any] = {}
    for name, (folder, listing) in SETS.items():
        base = data / folder
        pictures = FolderData(base, list_file=base / listing if listing else None)
        rows = read_embeddings(next((data / "text").glob("*.npz")), pictures.prompts)
        head = DenseZeroShot(backbone.dense, rows, backbone.preprocess, centred)
        result = evaluate(head, pictures, each=True)
        assert result.counts is not None
        found[name] = {
            "miou": result.scores.miou,
            "interval_95": bootstrap_miou(result.counts, scored=pictures.scored),
            "pixel_accuracy": result.scores.pixel_accuracy,
            "images": result.images,
            "per_class": result.scores.per_class,
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures photo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=str(PHOTO))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results.json"))
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    record = {
        "model": Path(chosen.model).name,
        "date": time.strftime("%Y-%m-%d"),
        "as_given": score(chosen.model, chosen.data, centred=False),
        "centred": score(chosen.model, chosen.data, centred=True),
    }
    chosen.json.write_text(json.dumps(record, indent=2) + "\n")
    for form in ("as_given", "centred"):
        for name, found in record[form].items():
            low, high = found["interval_95"]
            print(
                f"{name}, embeddings {form}: mIoU {100 * found['miou']:.1f} "
                f"({100 * low:.1f} to {100 * high:.1f}), pixels {100 * found['pixel_accuracy']:.1f}"
            )


if __name__ == "__main__":
    main()
