"""The whole of it on the embedded model: prune, measure, compare, draw, transfer."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ovsprune.core.errors import OptionError, OutputError
from ovsprune.core.files import write_text
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.datasets import Sample, ScenesData
from ovsprune.jobs.inspect import inspect
from ovsprune.jobs.prune import prune
from ovsprune.profiling.timing import Pass, alternate, paired_speedup, thread_limit
from ovsprune.pruning.config import PruneConfig

__all__ = ["METHODS", "demo"]

MODEL = "tiny"
SLIM = "slim"
PICTURE = "picture.png"
RECORD = "record.json"
SHOWN = 4
"""Scenes on the picture."""
BATCHES = (1, 8)

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "random+closed-form": {
        "criterion": "random",
        "allocation": "uniform",
        "recovery": "closed-form",
    },
    "magnitude": {"criterion": "magnitude", "allocation": "uniform", "recovery": "none"},
    "random": {"criterion": "random", "allocation": "uniform", "recovery": "none"},
}
"""What is compared at the same budget: name to the options of ``prune``."""


def demo(
    output: str | Path = "demo",
    *,
    ratio: float = 0.5,
    scenes: int = 200,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune ``tiny``, compare it with simpler ways, draw a picture, transfer it into a small SAN.

    Args:
        output: Directory for ``slim/``, ``picture.png`` and ``record.json``; those of an earlier
            demo are replaced.
        ratio: Share of the MACs to remove, in (0, 1).
        scenes: Procedural test scenes for the mIoU.
        seed: Of everything that is drawn.
        threads: CPU threads; None leaves PyTorch's choice.
        progress: Told of every step.

    Returns:
        ``model, ratio, scenes, seed, rows[{method, macs, params, file_size (bytes),
        latency{batch: s}, speedup{batch}, miou, retention}]`` (dense first), ``prune, inspect,
        evaluate, benchmark`` (as those commands give them, of the default), ``transfer`` (how the
        small SAN changed, or ``skipped`` and why), ``picture, output, seconds``.

    Raises:
        OptionError: ``ratio`` or ``scenes`` is out of range.
        OutputError: The directory holds something else, or cannot be written.
    """
    progress = progress or Silent()
    start = time.perf_counter()
    if scenes < SHOWN:
        raise OptionError(f"--scenes {scenes} is too few; give {SHOWN} or more")
    PruneConfig(ratio=ratio, seed=seed).check()
    place = Path(output)
    _check_place(place)
    with (
        thread_limit(threads),
        progress.stage("ovsprune demo", len(METHODS) + 4) as advance,
    ):
        show = _Demo(place, ratio, scenes, seed, progress)
        _make(place)
        for method in METHODS:
            show.prune(method)
            advance(1)
        show.score()
        advance(1)
        show.time()
        advance(1)
        picture = show.draw()
        advance(1)
        transfer = show.transfer()
        advance(1)
    record = {
        "model": MODEL,
        "ratio": ratio,
        "scenes": scenes,
        "seed": seed,
        "rows": show.rows(),
        "prune": show.record,
        "inspect": inspect(place / SLIM),
        "evaluate": show.found["default"],
        "benchmark": {"rows": show.benchmark()},
        "transfer": transfer,
        "picture": str(picture),
        "output": str(place),
        "seconds": time.perf_counter() - start,
    }
    write_text(place / RECORD, json.dumps(record, indent=2) + "\n")
    return record


class _Drawn:
    """Scenes that are drawn once and looked at by every tower."""

    def __init__(self, scenes: ScenesData, progress: Progress) -> None:
        self.class_names, self.prompts = scenes.class_names, scenes.prompts
        self.scored = scenes.scored
        self.samples: list[Sample] = []
        with progress.stage("drawing test scenes", len(scenes)) as advance:
            for sample in scenes:
                self.samples.append(sample)
                advance(1)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


class _Demo:
    """The steps of the demo, and what they have found so far."""

    def __init__(
        self, place: Path, ratio: float, scenes: int, seed: int, progress: Progress
    ) -> None:
        from ovsprune.backbones import load_backbone
        from ovsprune.evaluation.backbone_scores import class_embeddings

        self.place, self.ratio, self.seed, self.progress = place, ratio, seed, progress
        dense = load_backbone(MODEL)
        self.towers: dict[str, Backbone] = {"dense": dense}
        self.data = _Drawn(ScenesData(scenes, size=max(dense.preprocess.size)), progress)
        self.embeddings: Tensor = class_embeddings(dense, self.data.prompts)
        self.record: dict[str, Any] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.times: dict[int, dict[str, list[float]]] = {}

    def prune(self, method: str) -> None:
        """Prune by one method; the default's checkpoint is saved and read back."""
        from ovsprune.backbones import load_backbone

        dense = self.towers["dense"]
        saved = self.place / SLIM if method == "default" else None
        with self.progress.stage(f"pruning {MODEL}: {method}", 1) as advance:
            result = prune(
                dense,
                self.ratio,
                seed=self.seed,
                output=saved,
                overwrite=True,
                progress=self.progress,
                **METHODS[method],
            )
            advance(1)
        if saved is None:
            self.towers[method] = dataclasses.replace(dense, tower=result.tower)
        else:
            self.record = result.record()
            self.towers[method] = load_backbone(str(saved))

    def score(self) -> None:
        """Zero-shot mIoU of every tower on the same test scenes."""
        from ovsprune.evaluation.backbone_scores import score_backbone

        for method, backbone in self.towers.items():
            self.found[method] = score_backbone(
                backbone, self.embeddings, self.data, 16, self.progress, f"mIoU of {method}"
            )

    def time(self) -> None:
        """Latency of every tower, in turn."""
        size = self.towers["dense"].preprocess.size
        for batch in BATCHES:
            images = torch.randn(
                batch, 3, *size, generator=torch.Generator().manual_seed(self.seed)
            )
            self.times[batch] = alternate(
                {method: _forward(one, images) for method, one in self.towers.items()},
                progress=self.progress,
                label=f"latency at batch {batch}",
            )

    def draw(self) -> Path:
        """Scene, labels, dense and slim segmentation side by side."""
        from ovsprune.evaluation.backbone_scores import zero_shot_head
        from ovsprune.report.pictures import side_by_side

        heads = [
            zero_shot_head(self.towers[method], self.embeddings) for method in ("dense", "default")
        ]
        rows = [
            (sample.image, [sample.label, *(one.segment(sample.image) for one in heads)])
            for sample in self.data.samples[:SHOWN]
        ]
        removed = f"slim, {self.ratio:.0%} fewer MACs"
        titles = [
            "scene",
            "labels",
            f"dense (mIoU {self._miou('dense'):.1%})",
            f"{removed} (mIoU {self._miou('default'):.1%})",
        ]
        path = self.place / PICTURE
        side_by_side(rows, titles, self.data.class_names).save(path)
        return path

    def transfer(self) -> dict[str, Any]:
        """Put the slim tower into a small SAN, where mmsegmentation is installed."""
        from ovsprune.jobs.small_san import transfer_into_small_san

        with self.progress.stage("a small SAN of mmsegmentation, slimmed", 1) as advance:
            found = transfer_into_small_san(
                self.towers["dense"],
                self.place / SLIM,
                self.embeddings,
                self.data.class_names,
                self.data.samples[:SHOWN],
                self.seed,
            )
            advance(1)
        return found

    def benchmark(self) -> list[dict[str, Any]]:
        """Latency and throughput of the dense and the slim tower, as ``ovsprune benchmark``."""
        rows = []
        for row in self.rows():
            if row["method"] not in ("dense", "default"):
                continue
            for batch in BATCHES:
                latency = row["latency"][str(batch)]
                rows.append(
                    {
                        "name": f"{MODEL} {'dense' if row['method'] == 'dense' else 'slim'}",
                        "role": "against" if row["method"] == "dense" else "model",
                        "batch": batch,
                        "latency": latency,
                        "throughput": batch / latency,
                        "speedup": row["speedup"][str(batch)],
                    }
                )
        return rows

    def _miou(self, method: str) -> float:
        return float(self.found[method]["miou"])

    def rows(self) -> list[dict[str, Any]]:
        """One row a method, dense first."""
        from ovsprune.graph.costs import count_costs

        rows = []
        for method, backbone in self.towers.items():
            costs = count_costs(backbone.tower, backbone.preprocess.size)
            times = {batch: found[method] for batch, found in self.times.items()}
            dense = {batch: found["dense"] for batch, found in self.times.items()}
            rows.append(
                {
                    "method": method,
                    "macs": costs.macs,
                    "params": costs.params,
                    "file_size": len(save(backbone.tower.state_dict())),
                    "latency": {str(b): statistics.median(times[b]) for b in BATCHES},
                    "speedup": {str(b): paired_speedup(dense[b], times[b]) for b in BATCHES},
                    "miou": self._miou(method),
                    "retention": self._miou(method) / self._miou("dense"),
                }
            )
        return rows


def _forward(backbone: Backbone, images: Tensor) -> Pass:
    return lambda: backbone.tower(images)


def _check_place(output: Path) -> None:
    """Make sure that nothing but an earlier demo's files is lost.

    Raises:
        OutputError: It is a file, or has a ``slim/`` that is no slim checkpoint.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; name a directory with -o")
    slim = output / SLIM
    if slim.exists() and not (slim / "config.json").is_file():
        raise OutputError(
            f"{slim} exists and is no slim checkpoint, so the demo does not replace it; "
            "name another directory with -o"
        )


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{output} cannot be made ({error.strerror or error}); name another directory with -o"
        ) from error
