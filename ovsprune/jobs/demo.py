"""Demo on the embedded model: prune, evaluate, measure, draw, transfer."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ovsprune import backbones
from ovsprune.comparison.scoring import CachedData
from ovsprune.core.errors import OptionError, OutputError
from ovsprune.core.files import write_text
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.backbone_scores import class_embeddings, score_backbone, zero_shot_head
from ovsprune.evaluation.datasets import ScenesData
from ovsprune.graph.costs import count_costs
from ovsprune.jobs.inspect import inspect
from ovsprune.jobs.prune import prune
from ovsprune.profiling.timing import alternate, latency_figures, random_images, thread_limit
from ovsprune.pruning.config import PruneConfig
from ovsprune.report.pictures import side_by_side

__all__ = ["METHODS", "demo"]

MODEL = "tiny"
SLIM = "slim"
PICTURE = "picture.png"
RECORD = "record.json"
SHOWN = 4
"""Number of scenes in the image."""
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
"""Methods compared at the same budget: name to options of ``prune``."""


def demo(
    output: str | Path = "demo",
    *,
    ratio: float = 0.5,
    scenes: int = 200,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune ``tiny``, compare with simpler methods, draw segmentations, transfer into a small SAN.

    Args:
        output: Directory for ``slim/``, ``picture.png`` and ``record.json``; those of an earlier
            demo are replaced.
        ratio: Fraction of the MACs to remove, in (0, 1).
        scenes: Number of procedural test scenes for the mIoU.
        seed: Seed of all random draws.
        threads: CPU threads; None for PyTorch's default.
        progress: Progress reporter.

    Returns:
        ``model, ratio, scenes, seed, rows[{method, macs, params, file_size (bytes),
        latency{batch: s}, speedup{batch}, miou, retention}]`` (dense first), ``prune, inspect,
        evaluate, benchmark`` (records of these commands for the default method), ``transfer``
        (record of the small SAN, or ``skipped`` with the reason), ``picture, output, seconds``.

    Raises:
        OptionError: ``ratio`` or ``scenes`` is out of range.
        OutputError: The directory has other contents, or cannot be written.
    """
    progress = progress or Silent()
    start = time.perf_counter()
    if scenes < SHOWN:
        raise OptionError(f"--scenes {scenes} is too few; give {SHOWN} or more")
    # A ratio out of range is refused before the scenes are drawn.
    PruneConfig(ratio=ratio, seed=seed).check()
    directory = Path(output)
    _check_output(directory)
    # One step per method, then score, time, draw and transfer.
    with thread_limit(threads), progress.stage("ovsprune demo", len(METHODS) + 4) as advance:
        run = _Demo(directory, ratio, scenes, seed, progress)
        _make_directory(directory)
        steps: list[Callable[[], None]] = [partial(run.prune, method) for method in METHODS]
        for step in (*steps, run.score, run.time, run.draw, run.transfer):
            step()
            advance(1)
    record = {
        "model": MODEL,
        "ratio": ratio,
        "scenes": scenes,
        "seed": seed,
        "rows": run.rows(),
        "prune": run.record,
        "inspect": inspect(directory / SLIM),
        "evaluate": run.scores["default"],
        "benchmark": {"rows": run.benchmark()},
        "transfer": run.transferred,
        "picture": str(directory / PICTURE),
        "output": str(directory),
        "seconds": time.perf_counter() - start,
    }
    write_text(directory / RECORD, json.dumps(record, indent=2) + "\n")
    return record


class _Demo:
    """Steps of the demo and their results."""

    def __init__(
        self, directory: Path, ratio: float, scenes: int, seed: int, progress: Progress
    ) -> None:
        self.directory, self.ratio, self.seed, self.progress = directory, ratio, seed, progress
        dense = backbones.load_backbone(MODEL)
        self.towers: dict[str, Backbone] = {"dense": dense}
        self.data = CachedData(ScenesData(scenes, size=max(dense.preprocess.size)))
        with progress.stage("drawing test scenes", len(self.data)) as advance:
            for _ in self.data:  # the scenes are drawn once, and used for every tower
                advance(1)
        self.embeddings: Tensor = class_embeddings(dense, self.data.prompts)
        self.record: dict[str, Any] = {}
        self.transferred: dict[str, Any] = {}
        self.scores: dict[str, dict[str, Any]] = {}
        self.times: dict[int, dict[str, list[float]]] = {}  # batch to method to seconds per round

    def prune(self, method: str) -> None:
        """Prune with one method; the checkpoint of the default is saved and loaded again."""
        dense = self.towers["dense"]
        saved = self.directory / SLIM if method == "default" else None
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
            # Nothing was saved; only the tower differs from the dense backbone.
            self.towers[method] = dataclasses.replace(dense, tower=result.tower)
        else:
            self.record = result.record()
            # Later steps use the saved checkpoint, as a user would.
            self.towers[method] = backbones.load_backbone(str(saved))

    def score(self) -> None:
        """Evaluate the zero-shot mIoU of every tower on the same test scenes."""
        for method, backbone in self.towers.items():
            self.scores[method] = score_backbone(
                backbone, self.embeddings, self.data, 16, self.progress, f"mIoU of {method}"
            )

    def time(self) -> None:
        """Measure the latency of all towers in alternation."""
        size = self.towers["dense"].preprocess.size
        for batch in BATCHES:
            images = random_images(batch, size, self.seed)
            self.times[batch] = alternate(
                {name: partial(backbone.tower, images) for name, backbone in self.towers.items()},
                progress=self.progress,
                label=f"latency at batch {batch}",
            )

    def draw(self) -> None:
        """Draw scene, labels, dense and slim segmentation side by side."""
        heads = [
            zero_shot_head(self.towers[method], self.embeddings) for method in ("dense", "default")
        ]
        rows = [
            (sample.image, [sample.label, *(head.segment(sample.image) for head in heads)])
            for sample in islice(self.data, SHOWN)
        ]
        dense, slim = self.scores["dense"]["miou"], self.scores["default"]["miou"]
        titles = [
            "scene",
            "labels",
            f"dense (mIoU {dense:.1%})",
            f"slim, {self.ratio:.0%} fewer MACs (mIoU {slim:.1%})",
        ]
        side_by_side(rows, titles, self.data.class_names).save(self.directory / PICTURE)

    def transfer(self) -> None:
        """Transfer the slim tower into a small SAN, if mmsegmentation is installed."""
        from ovsprune.jobs.small_san import transfer_into_small_san

        with self.progress.stage("transfer into a small SAN of mmsegmentation", 1) as advance:
            self.transferred = transfer_into_small_san(
                self.towers["dense"],
                self.directory / SLIM,
                self.embeddings,
                self.data.class_names,
                list(islice(self.data, SHOWN)),
                self.seed,
            )
            advance(1)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per method, dense first."""
        rows = []
        for method, backbone in self.towers.items():
            costs = count_costs(backbone.tower, backbone.preprocess.size)
            miou = self.scores[method]["miou"]
            figures = self._figures(method)
            rows.append(
                {
                    "method": method,
                    "macs": costs.macs,
                    "params": costs.params,
                    # Serialised in memory: only the default method has a file, and that file also
                    # holds the text tower.
                    "file_size": len(save(backbone.tower.state_dict())),
                    # JSON turns the keys of objects into strings.
                    "latency": {str(b): f["latency"] for b, f in figures.items()},
                    "speedup": {str(b): f["speedup"] for b, f in figures.items()},
                    "miou": miou,
                    "retention": miou / self.scores["dense"]["miou"],
                }
            )
        return rows

    def benchmark(self) -> list[dict[str, Any]]:
        """Return latency and throughput of dense and slim tower, as in ``ovsprune benchmark``."""
        return [
            {"name": f"{MODEL} {kind}", "role": role, "batch": batch, **figures}
            for method, kind, role in (("dense", "dense", "against"), ("default", "slim", "model"))
            for batch, figures in self._figures(method).items()
        ]

    def _figures(self, method: str) -> dict[int, dict[str, float]]:
        return {b: latency_figures(t, method, "dense", b) for b, t in self.times.items()}


def _check_output(output: Path) -> None:
    """Check that only files of an earlier demo would be replaced.

    Raises:
        OutputError: ``output`` is a file, or has a ``slim/`` that is no slim checkpoint.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; name a directory with -o")
    slim = output / SLIM
    if slim.exists() and not (slim / "config.json").is_file():
        raise OutputError(
            f"{slim} exists and is no slim checkpoint, so the demo does not replace it; "
            "name another directory with -o"
        )


def _make_directory(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{output} cannot be created ({error.strerror or error}); name another directory "
            "with -o"
        ) from error
