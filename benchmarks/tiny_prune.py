"""Every method on ``tiny`` under one budget: what is kept of its mIoU, over seeds.

    python benchmarks/tiny_prune.py [--seeds 5] [--scenes 500]

Writes ``benchmarks/tiny_prune.json`` (rows as they are done: run again, it goes on where it
stopped) and ``benchmarks/tiny_prune.md``. The seed chooses the calibration scenes and, for
``random``, the order.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from ovsprune import backbones
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.datasets import ScenesData
from ovsprune.jobs.evaluate import class_embeddings, score_backbone
from ovsprune.jobs.prune import prune

HERE = Path(__file__).parent
METHODS: dict[str, dict[str, str]] = {
    "default": {},
    "reconstruction, uniform + closed-form": {"allocation": "uniform"},
    "magnitude, sensitivity + closed-form": {"criterion": "magnitude"},
    "magnitude, uniform + closed-form": {"criterion": "magnitude", "allocation": "uniform"},
    "random, uniform + closed-form": {"criterion": "random", "allocation": "uniform"},
    "reconstruction, sensitivity": {"recovery": "none"},
    "magnitude, uniform": {"criterion": "magnitude", "allocation": "uniform", "recovery": "none"},
    "random, uniform": {"criterion": "random", "allocation": "uniform", "recovery": "none"},
}
RATIOS = (0.5, 0.7)


def score(backbone: Backbone, scenes: int) -> dict[str, float]:
    """mIoU and pixel accuracy on the test scenes."""
    data = ScenesData(scenes, size=max(backbone.preprocess.size))
    embeddings = class_embeddings(backbone, data.prompts)
    found = score_backbone(backbone, embeddings, data, 32, Silent(), "scoring")
    return {"miou": found["miou"], "pixel_accuracy": found["pixel_accuracy"]}


def row(dense: Backbone, method: str, ratio: float, seed: int, scenes: int) -> dict[str, Any]:
    """Prune with one method and score what is left."""
    result = prune(dense, ratio, seed=seed, **METHODS[method])  # type: ignore[arg-type]
    whole, dense.tower = dense.tower, result.tower
    try:
        found = score(dense, scenes)
    finally:
        dense.tower = whole
    record = result.record()
    return {
        "method": method,
        "ratio": ratio,
        "seed": seed,
        "achieved": record["achieved"],
        **found,
        "relative_error": record["fidelity"]["relative_error"],
        "seconds": record["seconds"],
    }


def save(path: Path, document: dict[str, Any]) -> None:
    """Write so that a reader never sees half of it."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def table(document: dict[str, Any]) -> str:
    """The rows as Markdown: mean and standard deviation over seeds."""
    dense = document["dense"]["miou"]
    lines = [
        "# `tiny`: what pruning keeps",
        "",
        f"Dense mIoU {100 * dense:.1f}% on {document['scenes']} test scenes; 256 procedural "
        "calibration scenes; mean ± standard deviation over seeds. Kept: share of the dense mIoU. "
        "Error: relative error of the dense features on held-out scenes.",
        "",
        "| method | ratio | seeds | kept | mIoU | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ratio in RATIOS:
        for method in METHODS:
            rows = [r for r in document["rows"] if (r["method"], r["ratio"]) == (method, ratio)]
            if not rows:
                continue
            kept = [100 * r["miou"] / dense for r in rows]
            spread = f" ± {statistics.stdev(kept):.1f}" if len(kept) > 1 else ""
            lines.append(
                f"| {method} | {ratio} | {len(rows)} | {statistics.mean(kept):.1f}%{spread} | "
                f"{100 * statistics.mean(r['miou'] for r in rows):.1f}% | "
                f"{statistics.mean(r['relative_error'] for r in rows):.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--output", type=Path, default=HERE / "tiny_prune.json")
    chosen = parser.parse_args()
    dense = backbones.load("tiny")
    document: dict[str, Any] = {"scenes": chosen.scenes, "rows": []}
    if chosen.output.is_file():
        document = json.loads(chosen.output.read_text("utf-8"))
    document.setdefault("dense", score(dense, chosen.scenes))
    done = {(r["method"], r["ratio"], r["seed"]) for r in document["rows"]}
    for seed in range(chosen.seeds):
        for ratio in RATIOS:
            for method in METHODS:
                if (method, ratio, seed) in done:
                    continue
                document["rows"].append(row(dense, method, ratio, seed, chosen.scenes))
                save(chosen.output, document)
                last = document["rows"][-1]
                kept = last["miou"] / document["dense"]["miou"]
                print(f"{seed} {ratio} {method}: kept {kept:.3f}", flush=True)
    save(chosen.output, document)
    chosen.output.with_suffix(".md").write_text(table(document), encoding="utf-8")


if __name__ == "__main__":
    main()
