"""Verification of an exported graph: its outputs and its latency, next to those of the tower."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ovsprune.core.errors import ExportError
from ovsprune.core.progress import Progress
from ovsprune.exporting.onnx_graph import OUTPUTS, Run
from ovsprune.profiling.timing import Pass, alternate, latency_figures, random_images
from ovsprune.slim import SlimTower

__all__ = ["check_outputs", "measure_latency", "require_accuracy", "second_size"]

TOLERANCE = 1e-4
"""Maximum error of the graph, in standard deviations of the tower's output."""

_STEP = 32
"""The second size for checking a dynamic graph is a multiple of this, in pixels."""

Size = tuple[int, int]


def second_size(size: Size) -> Size:
    """Return a second size with another aspect ratio, for checking a dynamic graph."""
    # Different factors, so that exchanged axes change the result.
    height, width = size[0] * 1.5, size[1] * 1.25
    return math.ceil(height / _STEP) * _STEP, math.ceil(width / _STEP) * _STEP


def check_outputs(
    tower: SlimTower,
    session: Run,
    sizes: Sequence[Size],
    batch_sizes: Sequence[int],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Compare graph and tower on random images, for every size, batch size and output.

    Returns:
        Rows ``output, batch, size, max_error`` (absolute) ``, relative_error`` (in standard
        deviations of the tower's output).

    Raises:
        ExportError: An output of the graph has another shape than the tower's.
    """
    rows = []
    with progress.stage("check", len(sizes) * len(batch_sizes)) as advance:
        for size in sizes:
            for batch in batch_sizes:
                images = random_images(batch, size)
                with torch.inference_mode():
                    expected = tower.outputs(images)
                for name, expected_output, output in zip(
                    OUTPUTS, expected, session(images), strict=True
                ):
                    rows.append(_row(name, batch, size, expected_output, output))
                advance(1)
    return rows


def _row(name: str, batch: int, size: Size, expected: Tensor, output: Tensor) -> dict[str, Any]:
    # The subtraction below would broadcast some wrong shapes.
    if output.shape != expected.shape:
        raise ExportError(
            f"{name} of the graph has shape {tuple(output.shape)} at {size[0]}x{size[1]}, that of "
            f"the tower {tuple(expected.shape)}; nothing was written"
        )
    error = (output - expected).abs().max()
    return {
        "output": name,
        "batch": batch,
        "size": list(size),
        "max_error": float(error),
        "relative_error": float(error / expected.std()),
    }


def require_accuracy(checks: Sequence[Mapping[str, Any]]) -> None:
    """Check that all errors are at most :data:`TOLERANCE`.

    Raises:
        ExportError: An error is larger, or not a number.
    """
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


def measure_latency(
    tower: SlimTower,
    session: Run,
    size: Size,
    batch_sizes: Sequence[int],
    pairs: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Measure torch and onnxruntime in ``pairs`` alternating passes; without pairs, nothing."""
    rows = []
    for batch in batch_sizes if pairs else ():
        images = random_images(batch, size)
        passes: dict[str, Pass] = {
            "torch": partial(tower.outputs, images),
            "onnxruntime": partial(session, images),
        }
        times = alternate(
            passes, rounds=pairs, progress=progress, label=f"latency at batch {batch}"
        )
        for runtime in times:
            figures = latency_figures(times, runtime, "torch", batch)
            rows.append({"runtime": runtime, "batch": batch, "size": list(size), **figures})
    return rows
