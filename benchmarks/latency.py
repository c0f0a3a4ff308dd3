"""Measured speed-up of a slim tower against its dense one, beside the ratio of their MACs.

    python benchmarks/latency.py --model tiny --model ViT-B/16 --output benchmarks/latency.json

The towers of one row run in alternating passes of one process, so a busy machine is busy for
both; the speed-up is the median over the pairs. Weights do not change speed: towers other than
``tiny`` are measured with random weights unless ``--pretrained`` names some. The widths are what
the default allocation gives (``--allocation``), odd ones included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import ovsprune
from ovsprune.cli.progress import Bars
from ovsprune.jobs.prune import prune


def row(name: str, given: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """Prune ``name`` into a temporary directory and measure it."""
    pretrained = given.pretrained or (None if name == "tiny" else "none")
    with tempfile.TemporaryDirectory() as folder:
        result = prune(
            name,
            given.ratio,
            pretrained=pretrained,
            allocation=given.allocation,
            criterion="magnitude" if pretrained == "none" else "reconstruction",
            recovery="none",
            samples=32,
            text=False,
            threads=given.threads,
            output=Path(folder) / "slim",
            progress=progress,
        ).record()
        measured = ovsprune.benchmark(
            str(Path(folder) / "slim"),
            pairs=given.pairs,
            batch_sizes=given.batch_size or (1, 8),
            threads=given.threads,
            progress=progress,
        )
    macs = result["dense"]["macs"] / result["slim"]["macs"]
    rows = [
        {
            "batch": one["batch"],
            "latency": one["latency"],
            "speedup": one["speedup"],
            "share_of_macs_ratio": one["speedup"] / macs,
            "peak_memory": one["peak_memory"],
        }
        for one in measured["rows"]
        if one["role"] == "model"
    ]
    dense = {
        one["batch"]: {"latency": one["latency"], "peak_memory": one["peak_memory"]}
        for one in measured["rows"]
        if one["role"] == "against"
    }
    return {
        "model": name,
        "ratio": given.ratio,
        "allocation": given.allocation,
        "macs_ratio": macs,
        "widths": result["widths"],
        "threads": measured["threads"],
        "pairs": measured["pairs"],
        "slim": rows,
        "dense": dense,
    }


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="may be repeated; by default tiny")
    parser.add_argument("--pretrained")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, action="append")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="JSON; printed if not given")
    given = parser.parse_args()
    progress = Bars(Console(stderr=True, highlight=False))
    record = {
        "command": "python benchmarks/latency.py",
        "ovsprune": ovsprune.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "rows": [row(name, given, progress) for name in given.model or ["tiny"]],
    }
    text = json.dumps(record, indent=2) + "\n"
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
