"""Terminal summary of a training schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ovsprune.report.numbers import change, count, duration, file_size
from ovsprune.report.tables import table

__all__ = ["schedule_summary"]

Record = Mapping[str, Any]
Parts = Sequence[RenderableType]


def schedule_summary(record: Record) -> Parts:
    """Return tables of the trained layers, the cost of a step, and the measurements."""
    layers = record["layers"]
    parts = [_layers(record["policy"], layers), _flops(record)]
    if record["measured"]:
        rows = [
            [
                str(row["policy"]),
                duration(row["step_seconds"]),
                f"{row['speedup']:.2f}x",
                "?" if row["peak_memory"] is None else file_size(row["peak_memory"]),
            ]
            for row in record["measured"]
        ]
        columns = ["measured step", "time", "against all", "peak memory"]
        parts.append(table("", columns, rows))
    chosen = sum(layer["trains"] for layer in layers)
    parts.append(
        Text(
            f"{chosen} of {len(layers)} layers train: {len(record['trainable'])} parameters "
            f"with their followers; {len(record['frozen'])} parameters are frozen."
        )
    )
    return parts


def _layers(policy: str, layers: Sequence[Record]) -> RenderableType:
    rows = [
        [
            str(layer["name"]),
            "trains" if layer["trains"] else "",
            _alpha(layer["alpha"]),
            count(layer["numel"]),
        ]
        for layer in layers
    ]
    # "<" is a left-aligned column without a heading.
    return table(f"Policy {policy}", ["layer", "<", "alpha", "parameters"], rows)


def _alpha(value: float | None) -> str:
    # Only some policies measure alphas.
    if value is None:
        return ""
    # alpha is infinite for a layer without a fit.
    return f"{value:.2f}" if math.isfinite(value) else "none"


def _flops(record: Record) -> RenderableType:
    flops, batch = record["training_flops"], record["batch_size"]
    names = (
        ("forward", "forward pass"),
        ("activations", "gradients of activations"),
        ("weights", "gradients of weights"),
        ("step", "one step"),
        ("total", f"all {record['total_steps']:,} steps"),
    )
    rows = [[label, count(flops[key])] for key, label in names]
    rows.append(["training all layers", count(flops["all"])])
    rows.append(["saved", change(flops["all"], flops["total"])])
    images = "1 image" if batch == 1 else f"{batch} images"
    return table(f"FLOPs, {images} per step", ["", "FLOPs"], rows)
