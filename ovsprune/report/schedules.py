"""Summaries of plans for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ovsprune.report.numbers import change, count, duration, file_size
from ovsprune.report.tables import listing, table

__all__ = ["policies_summary", "schedule_summary"]

Record = Mapping[str, Any]
Parts = Sequence[RenderableType]


def policies_summary(record: Record) -> Parts:
    """The policies, with a line each."""
    return listing(record)


def schedule_summary(record: Record) -> Parts:
    """Layer by layer who trains; what a step costs; what was measured."""
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
        columns = ["a step, measured", "time", "against all", "peak memory"]
        parts.append(table("", columns, rows))
    chosen = sum(layer["trains"] for layer in layers)
    parts.append(
        Text(
            f"{chosen} of {len(layers)} layers train; {len(record['trainable'])} parameters with "
            f"what follows them, and {len(record['frozen'])} are frozen."
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
    return table(f"Policy {policy}", ["layer", "<", "alpha", "parameters"], rows)


def _alpha(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if math.isfinite(value) else "none"


def _flops(record: Record) -> RenderableType:
    flops, pictures = record["training_flops"], record["batch_size"]
    names = (
        ("forward", "forward pass"),
        ("activations", "gradients of activations"),
        ("weights", "gradients of weights"),
        ("step", "a step"),
        ("total", f"all {record['total_steps']:,} steps"),
    )
    rows = [[label, count(flops[key])] for key, label in names]
    rows.append(["training all layers", count(flops["all"])])
    rows.append(["saved", change(flops["all"], flops["total"])])
    many = "a picture" if pictures == 1 else f"{pictures} pictures"
    return table(f"FLOPs, {many} a step", ["", "FLOPs"], rows)
