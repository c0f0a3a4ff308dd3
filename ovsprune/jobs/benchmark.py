"""Latency, throughput and peak memory of a tower, against another one in the same run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.profiling.timing import (
    Pass,
    alternate,
    device_and_dtype,
    paired_speedup,
    peak_memory,
    thread_limit,
)

__all__ = ["benchmark"]


def benchmark(
    model: str,
    *,
    against: str | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    pairs: int = 20,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure ``model`` and ``against`` in alternating passes over the same input.

    Weights do not change speed: a dense model is measured with random ones, and needs no hub.

    Args:
        model: A model name or a slim directory.
        against: What to compare with; for a slim directory its dense base by default, and nothing
            for a dense model.
        batch_sizes: Pictures at a time.
        pairs: Alternating pairs of passes; the latency is the median.
        device: Where to run.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        threads: CPU threads; None leaves PyTorch's choice.
        memory: Also measure the peak memory, each in a fresh process (seconds each).
        progress: Told of every stage.

    Returns:
        ``model, against, rows[{name, role (model or against), batch, latency (s), throughput
        (pictures/s), peak_memory (bytes or None), macs, params, speedup}], pairs, device, dtype,
        threads, seconds``; ``speedup`` is the median over the pairs of dense time / slim time.

    Raises:
        OptionError: A number is out of range, or the two towers take different inputs.
        UnknownNameError: A name is unknown.
        CheckpointError: A slim directory is damaged.
    """
    if pairs < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise OptionError(
            f"--pairs {pairs} and --batch-size {', '.join(map(str, batch_sizes))} "
            "must be 1 or more each"
        )
    progress = progress or Silent()
    start = time.perf_counter()
    found, kind = device_and_dtype(device, dtype)
    with thread_limit(threads) as used:
        towers = _towers(model, against)
        rows = []
        for batch in batch_sizes:
            rows += _rows(towers, batch, pairs, found, kind, progress)
        if memory:
            _add_memory(rows, towers, device, dtype, used, progress)
    return {
        "model": model,
        "against": towers[0].source if len(towers) > 1 else None,
        "rows": rows,
        "pairs": pairs,
        "device": device,
        "dtype": dtype,
        "threads": used,
        "seconds": time.perf_counter() - start,
    }


@dataclasses.dataclass(frozen=True, eq=False)
class _Tower:
    """One of the towers: what it is called, how a fresh process loads it, and itself."""

    label: str
    role: str
    source: str
    pretrained: str | None
    backbone: Backbone


def _towers(model: str, against: str | None) -> list[_Tower]:
    measured = _tower(model, "model")
    if against is None and measured.backbone.slim is not None:
        against = measured.backbone.slim.spec.base.model
    return [measured] if against is None else [_tower(against, "against"), measured]


def _tower(source: str, role: str) -> _Tower:
    from ovsprune.backbones import load_backbone

    # Weights do not change speed, so a dense model needs no file and no hub.
    pretrained = None if Path(source).is_dir() else "none"
    backbone = load_backbone(source, pretrained=pretrained)
    kind = "dense" if backbone.slim is None else "slim"
    return _Tower(f"{backbone.name} {kind}", role, source, pretrained, backbone)


def _rows(
    towers: list[_Tower],
    batch: int,
    pairs: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> list[dict[str, Any]]:
    from ovsprune.graph.costs import count_costs

    size = towers[0].backbone.preprocess.size
    for other in towers[1:]:
        if other.backbone.preprocess.size != size:
            raise OptionError(
                f"{other.source} takes pictures of {other.backbone.preprocess.size} pixels, "
                f"{towers[0].source} of {size}; name an --against of the same input size"
            )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *size, generator=generator).to(device, dtype)
    passes = {
        tower.role: _forward(tower.backbone.tower.to(device, dtype).eval(), images)
        for tower in towers
    }
    times = alternate(
        passes, rounds=pairs, device=device, progress=progress, label=f"latency at batch {batch}"
    )
    rows = []
    for tower in towers:
        latency = statistics.median(times[tower.role])
        costs = count_costs(tower.backbone.tower, size)
        rows.append(
            {
                "name": tower.label,
                "role": tower.role,
                "batch": batch,
                "latency": latency,
                "throughput": batch / latency,
                "peak_memory": None,
                "macs": costs.macs,
                "params": costs.params,
                "speedup": paired_speedup(times[towers[0].role], times[tower.role]),
            }
        )
    return rows


def _forward(tower: nn.Module, images: Tensor) -> Pass:
    return lambda: tower(images)


def _add_memory(
    rows: list[dict[str, Any]],
    towers: list[_Tower],
    device: str,
    dtype: str,
    threads: int,
    progress: Progress,
) -> None:
    by_role = {tower.role: tower for tower in towers}
    with progress.stage("peak memory, a fresh process each", len(rows)) as advance:
        for row in rows:
            tower = by_role[row["role"]]
            row["peak_memory"] = peak_memory(
                tower.source,
                row["batch"],
                pretrained=tower.pretrained,
                device=device,
                dtype=dtype,
                threads=threads,
            )
            advance(1)
