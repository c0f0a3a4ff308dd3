"""Export of a tower as an ONNX file that is verified in onnxruntime."""

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
"""Maximum error of the graph, in standard deviations of the tower's output."""

_STEP = 32
"""The second size for checking a dynamic graph is a multiple of this, in pixels."""

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
    """Export an image tower, slim or dense, in float32, and verify the file.

    The graph maps preprocessed ``images`` [B, 3, H, W] to ``pooled`` [B, C] and ``dense``
    [B, C, h, w] for any B. It is compared with the tower in onnxruntime on random images, for every
    batch size and (if height and width are dynamic) for two sizes. The file is written only if the
    maximum error is at most 1e-4 standard deviations of the tower's output.

    Args:
        model: Slim directory, model name, or loaded backbone.
        format: ``"onnx"``.
        size: Height and width in pixels; by default the native size.
        dynamic: Make height and width dynamic. ``size`` is then the first of the sizes checked.
        output: File to write, by default ``export/<model>.onnx``.
        overwrite: Replace an existing file.
        opset: ONNX opset; by default the choice of torch's exporter.
        batch_sizes: Batch sizes for the checks and the latency.
        pairs: Alternating passes of torch and onnxruntime, whose median is the latency; 0 skips the
            measurement.
        threads: CPU threads; None for PyTorch's default.
        pretrained: Weights for a model name: tag, file, or ``"none"``.
        activation: Activation function, for a weights file that does not name it.
        progress: Progress reporter.

    Returns:
        ``model, output, bytes, format, opset, size, dynamic, max_error`` (absolute),
        ``relative_error`` (in standard deviations of the output), ``checks[{output,
        batch, size, max_error, relative_error}], latency[{runtime, batch, size, latency (s),
        throughput (images/s), speedup (of onnxruntime over torch)}], metadata, threads,
        seconds``.

    Raises:
        OptionError: A value is out of its range, or an option does not apply to a directory.
        MissingLibraryError: A library of the extra ``export`` is not installed, or this version
            does not build the family.
        ExportError: The exporter failed, or the outputs differ; nothing was written.
        OutputError: The output exists, or cannot be written.
        UnknownNameError: A name is unknown.
        WeightsError: The weights cannot be loaded.
        CheckpointError: The directory is no valid slim checkpoint.
    """
    start = time.perf_counter()
    _check_numbers(format, size, batch_sizes, pairs)
    name = model.name if isinstance(model, Backbone) else str(model)
    path = _output_path(output or Path("export") / f"{backbones.canonical(name)}.onnx", overwrite)
    require_libraries()
    check_opset(opset)
    progress = progress or Silent()
    with thread_limit(threads) as used:
        backbone = _loaded(model, pretrained, activation, progress)
        size = size or backbone.preprocess.size
        with staged_file(path) as file:
            graph = _write_graph(backbone, file, size, dynamic, opset, progress)
            tower, session = _tower(backbone), open_session(file, used)
            sizes = [size, _second_size(size)] if dynamic else [size]
            checks = _checks(tower, session, sizes, batch_sizes, progress)
            _require_accuracy(checks)
            latency = _latency(tower, session, size, batch_sizes, pairs, progress)
            total = _move_weights(file, path)
    return {
        "model": name,
        "output": str(path),
        "bytes": total,
        "format": format,
        **graph,
        "size": list(size),
        "dynamic": dynamic,
        "max_error": max(row["max_error"] for row in checks),
        "relative_error": max(row["relative_error"] for row in checks),
        "checks": checks,
        "latency": latency,
        "threads": used,
        "seconds": time.perf_counter() - start,
    }


def _write_graph(
    backbone: Backbone,
    file: Path,
    size: Size,
    dynamic: bool,
    opset: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write the graph to ``file``; return its ``opset`` and ``metadata``."""
    with progress.stage("export", 1) as advance:
        tower = _tower(backbone)
        if not dynamic:
            # Interpolate the position embeddings once, not in every forward pass. The checks use
            # another tower, which interpolates in its forward pass.
            tower.set_size(size)
        metadata = _metadata(tower, size, dynamic)
        written = make_graph(tower, size, file, dynamic=dynamic, opset=opset, metadata=metadata)
        advance(1)
    return {"opset": written, "metadata": metadata}


def _check_numbers(format: str, size: Size | None, batch_sizes: Sequence[int], pairs: int) -> None:
    if format not in FORMATS:
        raise OptionError(f"--format {format!r} is unknown; known: {', '.join(FORMATS)}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise OptionError(f"--batch-size {', '.join(map(str, batch_sizes))}: give 1 or more each")
    if pairs < 0:
        raise OptionError(f"--pairs {pairs}: give 0 or more")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise OptionError(f"size {size}: give height and width in pixels, each 1 or more")


def _output_path(output: str | Path, overwrite: bool) -> Path:
    """Resolve ``output``, and check that it may be written."""
    path = Path(os.path.realpath(output))
    if path.is_dir():
        raise OutputError(f"{path} is a directory; name a file, as in -o {path.name}/tower.onnx")
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} exists already; choose another output, or pass --overwrite (overwrite=True)"
        )
    return path


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
    """Return the tower as a SlimTower in float32 on the CPU; a dense tower keeps all units."""
    checkpoint = backbone.slim
    if not isinstance(checkpoint, SlimCheckpoint):
        costs = count_costs(backbone.tower, backbone.preprocess.size)
        space = SearchSpace(tower=backbone.tower, layers=(), groups=[], protected={})
        spec = make_spec(backbone, space, Plan({}), (costs, costs), {})
        tensors = {f"visual.{k}": v.cpu() for k, v in backbone.tower.state_dict().items()}
        checkpoint = SlimCheckpoint(Path(backbone.name), spec, {}, tensors)
    return tower_of(checkpoint).float().requires_grad_(False)


def _second_size(size: Size) -> Size:
    """Return a second size with another aspect ratio, for checking a dynamic graph."""
    height, width = size[0] * 1.5, size[1] * 1.25
    return math.ceil(height / _STEP) * _STEP, math.ceil(width / _STEP) * _STEP


def _metadata(tower: SlimTower, size: Size, dynamic: bool) -> dict[str, str]:
    """Return the metadata of the file; ONNX allows strings only."""
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
    """Compare the graph with the tower, for every size, batch size and output."""
    rows = []
    with progress.stage("check", len(sizes) * len(batch_sizes)) as advance:
        for size in sizes:
            for batch in batch_sizes:
                images = _random_images(batch, size)
                with torch.inference_mode():
                    expected = tower.outputs(images)
                for name, want, got in zip(OUTPUTS, expected, session(images), strict=True):
                    rows.append(_row(name, batch, size, want, got))
                advance(1)
    return rows


def _row(name: str, batch: int, size: Size, want: Tensor, got: Tensor) -> dict[str, Any]:
    if got.shape != want.shape:
        raise ExportError(
            f"{name} of the graph has shape {tuple(got.shape)} at {size[0]}x{size[1]}, that of the "
            f"tower {tuple(want.shape)}; nothing was written"
        )
    error = (got - want).abs().max()
    return {
        "output": name,
        "batch": batch,
        "size": list(size),
        "max_error": float(error),
        "relative_error": float(error / want.std()),
    }


def _require_accuracy(checks: Sequence[Mapping[str, Any]]) -> None:
    # `not <=` instead of `>`, so that NaN is refused, too.
    wrong = [row for row in checks if not row["relative_error"] <= TOLERANCE]
    if wrong:
        worst = max(wrong, key=lambda row: row["relative_error"])
        height, width = worst["size"]
        raise ExportError(
            f"the graph's {worst['output']} is off by {worst['relative_error']:.2g} standard "
            f"deviations at batch {worst['batch']}, {height}x{width} (at most {TOLERANCE:g} is "
            "accepted); nothing was written. Try other versions of torch or onnxruntime, and "
            "report the problem"
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
        images = _random_images(batch, size)
        passes: dict[str, Pass] = {
            "torch": partial(tower.outputs, images),
            "onnxruntime": partial(session, images),
        }
        times = alternate(
            passes, rounds=pairs, progress=progress, label=f"latency at batch {batch}"
        )
        for runtime, seconds in times.items():
            latency = statistics.median(seconds)
            rows.append(
                {
                    "runtime": runtime,
                    "batch": batch,
                    "size": list(size),
                    "latency": latency,
                    "throughput": batch / latency,
                    "speedup": paired_speedup(times["torch"], seconds),
                }
            )
    return rows


def _random_images(batch: int, size: Size) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def _move_weights(file: Path, path: Path) -> int:
    """Move external weights, if any, next to the final path; return the bytes of all files."""
    total = file.stat().st_size
    weights = file.with_name(f"{file.name}.data")
    if weights.exists():
        total += weights.stat().st_size
        flush(weights)
        os.replace(weights, path.with_name(weights.name))
    return total
