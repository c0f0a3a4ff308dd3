"""What pruning itself costs: time in forward passes over the calibration pictures, peak memory.

    python benchmarks/prune_cost.py [--model ViT-B/16] [--samples 64] [--output DIR]

Random weights: cost does not depend on them. Writes ``benchmarks/prune_cost.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ovsprune import backbones
from ovsprune.calibration.pictures import ScenePictures
from ovsprune.core.protocols import Backbone
from ovsprune.jobs.prune import prune


def forward_pass(backbone: Backbone, samples: int) -> float:
    """Seconds of one pass of the dense tower over all the pictures, batches of 16."""
    images = torch.cat(list(ScenePictures(16, backbone.preprocess).batches(16)))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(0, samples, 16):
            backbone.pooled(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ViT-B/16")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--output", type=Path, help="keep the slim tower, for 'ovsprune benchmark'")
    chosen = parser.parse_args()
    backbone = backbones.load(chosen.model, pretrained="none")
    before = forward_pass(backbone, chosen.samples)
    start = time.perf_counter()
    result = prune(backbone, chosen.ratio, samples=chosen.samples, output=chosen.output)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    one_pass = (before + forward_pass(backbone, chosen.samples)) / 2
    row: dict[str, Any] = {
        "model": backbone.name,
        "samples": chosen.samples,
        "ratio": chosen.ratio,
        "achieved": result.achieved,
        "seconds": round(seconds, 1),
        "forward_pass_seconds": round(one_pass, 2),
        "forward_passes": round(seconds / one_pass, 1),
        "peak_gib": round(peak, 2),
        "timings": result.record()["timings"],
        "threads": torch.get_num_threads(),
    }
    path = Path(__file__).with_suffix(".json")
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    rows = [r for r in rows if (r["model"], r["samples"]) != (row["model"], row["samples"])]
    path.write_text(json.dumps({"rows": [*rows, row]}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
