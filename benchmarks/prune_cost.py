"""What pruning itself costs: time by stage, in forward passes over the pictures; peak memory.

    python benchmarks/prune_cost.py [--model ViT-B/16] [--samples 64] [--output DIR]

Random weights: cost does not depend on them. Adds a row to ``benchmarks/prune_cost.json``.
``prune_scaling.py`` draws the curve over sizes of towers.
"""

from __future__ import annotations

import argparse
import cProfile
import inspect
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ovsprune import backbones
from ovsprune.calibration import sensitivity
from ovsprune.calibration.linearised import InputPreconditioner
from ovsprune.calibration.obs import prune_columns
from ovsprune.calibration.pictures import RenderedPictures
from ovsprune.calibration.refit import Refit
from ovsprune.calibration.survey import Survey
from ovsprune.core.protocols import Backbone
from ovsprune.jobs import prune as job
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.profiling.memory import high_water
from ovsprune.pruning.pipeline import Pipeline

PASSED: Mapping[str, Sequence[Callable[..., Any]]] = {
    "survey": [Survey.run],
    "curves": [sensitivity.measure_curve],
    "elimination": [prune_columns],
    "refit": [Pipeline._recover],
    "ridge": [Refit.apply, InputPreconditioner.precondition],
    "write": [job.write],
}
"""Functions whose seconds are taken, what they call included."""


def seconds_in(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds that a profiled run spent in each of :data:`PASSED`."""
    by_code = {entry.code: entry.totaltime for entry in profile.getstats()}
    return {
        name: sum(by_code.get(inspect.unwrap(function).__code__, 0.0) for function in functions)
        for name, functions in PASSED.items()
    }


def stages_of(total: float, passed: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, which add up to ``total``; ``solver`` is O(n^3) in a group's units.

    ``moments``: the pictures through the dense tower, and second moments. ``curves``: the change
    of the features by width. ``solver``: the surgeon's eliminations and the ridge solves.
    ``refit``: both towers side by side, and their moments. ``write``: the checkpoint. ``rest``:
    the graph, the pictures, the check on held-out pictures.
    """
    stages = {
        "moments": passed["survey"] - passed["curves"] - passed["elimination"],
        "curves": passed["curves"],
        "solver": passed["elimination"] + passed["ridge"],
        "refit": passed["refit"] - passed["ridge"],
        "write": passed["write"],
    }
    stages["rest"] = total - sum(stages.values())
    return {name: round(value, 2) for name, value in stages.items()}


def forward_pass(backbone: Backbone, samples: int) -> float:
    """Seconds of one pass of the dense tower over all the pictures, batches of 16."""
    images = torch.cat(list(RenderedPictures(min(16, samples), backbone.preprocess).batches(16)))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(0, samples, 16):
            backbone.pooled(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cost(
    backbone: Backbone, samples: int, ratio: float = 0.5, output: Path | None = None
) -> dict[str, Any]:
    """Prune once, and say what it took: one row of the records in this folder.

    The peak is the process's: nothing else should have been done in it.
    """
    before = forward_pass(backbone, samples)
    profile = cProfile.Profile()
    start = time.perf_counter()
    with profile:
        result: PruneResult = prune(backbone, ratio, samples=samples, output=output)
    seconds = time.perf_counter() - start
    peak = high_water()
    one_pass = (before + forward_pass(backbone, samples)) / 2
    return {
        "model": backbone.name,
        "macs": result.spec.dense.macs,
        "params": result.spec.dense.params,
        "samples": samples,
        "ratio": ratio,
        "achieved": result.achieved,
        "seconds": round(seconds, 1),
        "forward_pass_seconds": round(one_pass, 2),
        "forward_passes": round(seconds / one_pass, 1),
        "peak_gib": None if peak is None else round(peak / 2**30, 2),
        "stages": stages_of(seconds, seconds_in(profile)),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ViT-B/16")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--output", type=Path, help="keep the slim tower, for 'ovsprune benchmark'")
    chosen = parser.parse_args()
    backbone = backbones.load_backbone(chosen.model, pretrained="none")
    row = cost(backbone, chosen.samples, chosen.ratio, chosen.output)
    path = Path(__file__).with_suffix(".json")
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    rows = [r for r in rows if (r["model"], r["samples"]) != (row["model"], row["samples"])]
    path.write_text(json.dumps({"rows": [*rows, row]}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
