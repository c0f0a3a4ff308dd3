"""Export for deployment: an ONNX graph, checked in onnxruntime before it takes its place."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovsprune import backbones
from ovsprune._version import __version__
from ovsprune.core.errors import ExportError, OptionError, OutputError
from ovsprune.core.files import flush, staged_file
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Plan
from ovsprune.exporting.onnx_graph import (
    OUTPUTS,
    Run,
    check_opset,
    make_graph,
    open_session,
    require_libraries,
)
from ovsprune.graph.costs import count_costs
from ovsprune.profiling.timing import Pass, alternate, paired_speedup, thread_limit
from ovsprune.pruning.provenance import make_spec
from ovsprune.pruning.search_space import SearchSpace
from ovsprune.slim import SlimCheckpoint, SlimTower
from ovsprune.slim.load import tower_of

__all__ = ["FORMATS", "TOLERANCE", "export"]

FORMATS = ("onnx",)
TOLERANCE = 1e-4
"""Largest error of the graph, relative to the standard deviation of the tower's output."""

_STEP = 32
"""The second size of a dynamic graph is a multiple of this, in pixels."""

Size = tuple[int, int]


def export(
    model: str | Path | Backbone,
    *,
    format: str = "onnx",
    size: Size | None = None,
    dynamic: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    opset: int | None = None,
    batch_sizes: Sequence[int] = (1, 2),
    pairs: int = 10,
    threads: int | None = None,
    pretrained: str | None = None,
    activation: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export an image tower, slim or dense, in float32, and check the file against it.

    The graph goes from ``images`` [B, 3, H, W], preprocessed, to ``pooled`` [B, C] and ``dense``
    [B, C, h, w]; B is free. Before the file takes its place it is run in onnxruntime on random
    pictures, of every batch size and of the size or, if sizes are free, of two; the largest error
    must be at most 1e-4 of the standard deviation of the tower's output.

    Args:
        model: A slim directory, a model name, or a loaded backbone.
        format: ``"onnx"``.
        size: Height and width in pixels; the native ones by default.
        dynamic: Leave height and width free. ``size`` is then one of the two that are checked.
        output: The file, ``export/<model>.onnx`` by default.
        overwrite: Replace a file that is there.
        opset: Of ONNX; by default torch's exporter decides.
        batch_sizes: Pictures at a time, in the check and for the latency.
        pairs: Alternating passes of torch and onnxruntime; the latency is the median. 0 measures
            none.
        threads: CPU threads of both; None leaves PyTorch's choice.
        pretrained: For a model name: tag, file, or ``"none"``.
        activation: For a bare file.
        progress: Told of every stage.

    Returns:
        ``model, output, bytes, format, opset, size, dynamic, max_error`` (largest absolute error),
        ``relative_error`` (largest, in standard deviations of the output), ``checks[{output,
        batch, size, max_error, relative_error}], latency[{runtime, batch, size, latency (s),
        throughput (pictures/s), speedup (of onnxruntime over torch)}], metadata, threads,
        seconds``.

    Raises:
        OptionError: A value is out of its range, or the model's directory cannot take an option.
        MissingLibraryError: What the extra ``export`` names is not installed, or the family is not
            one that this version builds.
        ExportError: The tower cannot be exported like this, or the graph does not give what the
            tower gives. Nothing was written.
        OutputError: The output exists, or cannot be written.
        UnknownNameError: A name is unknown.
        WeightsError: The weights cannot be had.
        CheckpointError: The directory is no sound checkpoint.
    """
    start = time.perf_counter()
    _check_numbers(format, size, batch_sizes, pairs)
    name = model.name if isinstance(model, Backbone) else str(model)
    place = _place(output or Path("export") / f"{backbones.canonical(name)}.onnx", overwrite)
    require_libraries()
    check_opset(opset)
    progress = progress or Silent()
    with thread_limit(threads) as used:
        backbone = _loaded(model, pretrained, activation, progress)
        tower = _tower(backbone)
        first = size or tower.spec.preprocess.size
        metadata = _metadata(tower, first, dynamic)
        with staged_file(place) as file:
            with progress.stage("export", 1) as advance:
                found = make_graph(
                    _fixed(backbone, None if dynamic else first),
                    first,
                    file,
                    dynamic=dynamic,
                    opset=opset,
                    metadata=metadata,
                )
                advance(1)
            session = open_session(file, used)
            sizes = [first, _second(first)] if dynamic else [first]
            checks = _checks(tower, session, sizes, batch_sizes, progress)
            _refuse_errors(checks)
            latency = _latency(tower, session, first, batch_sizes, pairs, progress)
            total = _move_weights(file, place)
    return {
        "model": name,
        "output": str(place),
        "bytes": total,
        "format": format,
        "opset": found,
        "size": list(first),
        "dynamic": dynamic,
        "max_error": max(row["max_error"] for row in checks),
        "relative_error": max(row["relative_error"] for row in checks),
        "checks": checks,
        "latency": latency,
        "metadata": metadata,
        "threads": used,
        "seconds": time.perf_counter() - start,
    }


def _check_numbers(format: str, size: Size | None, batch_sizes: Sequence[int], pairs: int) -> None:
    if format not in FORMATS:
        raise OptionError(f"--format {format!r} is unknown; known: {', '.join(FORMATS)}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise OptionError(f"--batch-size {', '.join(map(str, batch_sizes))}: give 1 or more each")
    if pairs < 0:
        raise OptionError(f"--pairs {pairs}: give 0 or more")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise OptionError(f"size {size}: give height and width in pixels, each 1 or more")


def _place(output: str | Path, overwrite: bool) -> Path:
    """The file that ``output`` means, if it may be written."""
    place = Path(os.path.realpath(output))
    if place.is_dir():
        raise OutputError(f"{place} is a directory; name a file, as in -o {place.name}/tower.onnx")
    if place.exists() and not overwrite:
        raise OutputError(
            f"{place} exists already; choose another output, or pass --overwrite (overwrite=True)"
        )
    return place


def _loaded(
    model: str | Path | Backbone,
    pretrained: str | None,
    activation: str | None,
    progress: Progress,
) -> Backbone:
    if isinstance(model, Backbone):
        return model
    with progress.stage(f"loading {model}", 1) as advance:
        backbone = backbones.load_backbone(str(model), pretrained=pretrained, activation=activation)
        advance(1)
    return backbone


def _tower(backbone: Backbone) -> SlimTower:
    """The backbone's tower in our own modules, float32 on the CPU; a dense one keeps everything."""
    given = backbone.slim
    if not isinstance(given, SlimCheckpoint):
        costs = count_costs(backbone.tower, backbone.preprocess.size)
        nothing = SearchSpace(tower=backbone.tower, layers=(), groups=[], protected={})
        spec = make_spec(backbone, nothing, Plan({}), (costs, costs), {})
        tensors = {f"visual.{k}": v.cpu() for k, v in backbone.tower.state_dict().items()}
        given = SlimCheckpoint(Path(backbone.name), spec, {}, tensors)
    return tower_of(given).float().requires_grad_(False)


def _fixed(backbone: Backbone, size: Size | None) -> SlimTower:
    """A tower of its own to be exported: with its positions interpolated, where the size is fixed.

    The one that it is checked against interpolates in its forward.
    """
    tower = _tower(backbone)
    if size is not None:
        tower.set_size(size)
    return tower


def _second(size: Size) -> Size:
    """Another size for the check, of another shape."""
    height, width = size[0] * 1.5, size[1] * 1.25
    return math.ceil(height / _STEP) * _STEP, math.ceil(width / _STEP) * _STEP


def _metadata(tower: SlimTower, size: Size, dynamic: bool) -> dict[str, str]:
    """What the file says of itself, in ONNX's own form: strings by name."""
    spec = tower.spec
    preprocess = {**asdict(spec.preprocess), "size": list(size)}
    return {
        "ovsprune": __version__,
        "model": spec.base.model,
        "pretrained": spec.base.pretrained or "",
        "trained": json.dumps(spec.base.trained),
        "ratio": f"{spec.ratio:.6f}",
        "activation": spec.activation,
        "preprocess": json.dumps(preprocess),
        "dynamic": json.dumps(dynamic),
    }


def _checks(
    tower: SlimTower,
    session: Run,
    sizes: Sequence[Size],
    batch_sizes: Sequence[int],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Errors of the graph: absolute, and in standard deviations of the tower's output."""
    rows = []
    with progress.stage("check", len(sizes) * len(batch_sizes)) as advance:
        for size in sizes:
            for batch in batch_sizes:
                images = _pictures(batch, size)
                with torch.inference_mode():
                    expected = tower.outputs(images)
                for name, wanted, given in zip(OUTPUTS, expected, session(images), strict=True):
                    rows.append(_row(name, batch, size, wanted, given))
                advance(1)
    return rows


def _row(name: str, batch: int, size: Size, wanted: Tensor, given: Tensor) -> dict[str, Any]:
    if given.shape != wanted.shape:
        raise ExportError(
            f"the graph gives {name} of shape {tuple(given.shape)} at {size[0]}x{size[1]}, the "
            f"tower {tuple(wanted.shape)}; nothing was written"
        )
    error = (given - wanted).abs().max()
    return {
        "output": name,
        "batch": batch,
        "size": list(size),
        "max_error": float(error),
        "relative_error": float(error / wanted.std()),
    }


def _refuse_errors(checks: Sequence[Mapping[str, Any]]) -> None:
    # not the other way round: an error that is no number is too large as well
    wrong = [row for row in checks if not row["relative_error"] <= TOLERANCE]
    if wrong:
        worst = max(wrong, key=lambda row: row["relative_error"])
        height, width = worst["size"]
        raise ExportError(
            f"the graph's {worst['output']} is off by {worst['relative_error']:.2g} standard "
            f"deviations at batch {worst['batch']}, {height}x{width} (at most {TOLERANCE:g} is "
            "accepted); nothing was written. Try other versions of torch or onnxruntime, and "
            "report it"
        )


def _latency(
    tower: SlimTower,
    session: Run,
    size: Size,
    batch_sizes: Sequence[int],
    pairs: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    rows = []
    for batch in batch_sizes if pairs else ():
        images = _pictures(batch, size)
        passes: dict[str, Pass] = {
            "torch": partial(tower.outputs, images),
            "onnxruntime": partial(session, images),
        }
        times = alternate(
            passes, rounds=pairs, progress=progress, label=f"latency at batch {batch}"
        )
        for runtime, found in times.items():
            latency = statistics.median(found)
            rows.append(
                {
                    "runtime": runtime,
                    "batch": batch,
                    "size": list(size),
                    "latency": latency,
                    "throughput": batch / latency,
                    "speedup": paired_speedup(times["torch"], found),
                }
            )
    return rows


def _pictures(batch: int, size: Size) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def _move_weights(file: Path, place: Path) -> int:
    """Put weights that lie in a file of their own beside where the graph goes; bytes of both."""
    total = file.stat().st_size
    weights = file.with_name(f"{file.name}.data")
    if weights.exists():
        total += weights.stat().st_size
        flush(weights)
        os.replace(weights, place.with_name(weights.name))
    return total
