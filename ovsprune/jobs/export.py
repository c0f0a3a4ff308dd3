"""Export of a tower as an ONNX file that is verified in onnxruntime."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovsprune import backbones
from ovsprune.core.errors import OptionError, OutputError
from ovsprune.core.files import flush, staged_file
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.exporting.onnx_graph import check_opset, make_graph, open_session, require_libraries
from ovsprune.exporting.towers import float_tower, metadata_of
from ovsprune.exporting.verification import (
    check_outputs,
    measure_latency,
    require_accuracy,
    second_size,
)
from ovsprune.profiling.timing import thread_limit
from ovsprune.pruning.loading import load_model

__all__ = ["FORMATS", "export"]

FORMATS = ("onnx",)

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
    if isinstance(model, Path):
        model = str(model)
    name = model.name if isinstance(model, Backbone) else model
    path = _output_path(output or Path("export") / f"{backbones.canonical(name)}.onnx", overwrite)
    # A missing library or a wrong opset is reported before the model is loaded.
    require_libraries()
    check_opset(opset)
    progress = progress or Silent()
    with thread_limit(threads) as used:
        # On the CPU, as the graph is checked and timed in onnxruntime's CPU provider.
        backbone = load_model(model, pretrained, activation, "cpu", progress)
        size = size or backbone.preprocess.size
        with staged_file(path) as file:
            graph = _write_graph(backbone, file, size, dynamic, opset, progress)
            tower, session = float_tower(backbone), open_session(file, used)
            sizes = [size, second_size(size)] if dynamic else [size]
            checks = check_outputs(tower, session, sizes, batch_sizes, progress)
            require_accuracy(checks)
            latency = measure_latency(tower, session, size, batch_sizes, pairs, progress)
            # The weights move first; the graph follows when the block ends without an error.
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
    backbone: Backbone, file: Path, size: Size, dynamic: bool, opset: int | None, progress: Progress
) -> dict[str, Any]:
    """Write the graph to ``file``; return its ``opset`` and ``metadata``."""
    with progress.stage("export", 1) as advance:
        tower = float_tower(backbone)
        if not dynamic:
            # Interpolate the position embeddings once, not in every forward pass. The checks use
            # another tower, which interpolates in its forward pass.
            tower.set_size(size)
        metadata = metadata_of(tower, size, dynamic)
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
    # The final rename would replace a link itself, not the file that it points to.
    path = Path(os.path.realpath(output))
    if path.is_dir():
        raise OutputError(f"{path} is a directory; name a file, as in -o {path.name}/tower.onnx")
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} exists already; choose another output, or pass --overwrite (overwrite=True)"
        )
    return path


def _move_weights(file: Path, path: Path) -> int:
    """Move external weights, if any, next to the final path; return the bytes of all files."""
    total = file.stat().st_size
    # Name that the exporter gives to the file of external weights.
    weights = file.with_name(f"{file.name}.data")
    if weights.exists():
        total += weights.stat().st_size
        # staged_file flushes the graph only.
        flush(weights)
        os.replace(weights, path.with_name(weights.name))
    return total
