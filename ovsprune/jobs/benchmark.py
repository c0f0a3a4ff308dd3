"""Latency, throughput and peak memory of a tower, relative to another one in the same run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.profiling.timing import device_and_dtype, thread_limit
from ovsprune.profiling.towers import add_memory, latency_rows, load_towers

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

    Dense models are measured with random weights, which do not affect speed.

    Args:
        model: Model name or slim directory.
        against: Reference model; by default the dense base of a slim directory, and none for a
            dense model.
        batch_sizes: Batch sizes.
        pairs: Alternating pairs of passes, whose median is the latency.
        device: Torch device.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        threads: CPU threads; None for PyTorch's default.
        memory: Also measure the peak memory, in a new process per row (some seconds each).
        progress: Progress reporter.

    Returns:
        ``model, against, rows[{name, role (model or against), batch, latency (s), throughput
        (images/s), peak_memory (bytes or None), macs, params, speedup}], pairs, device, dtype,
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
    torch_device, torch_dtype = device_and_dtype(device, dtype)
    with thread_limit(threads) as used:
        towers = load_towers(model, against)
        rows = []
        for batch in batch_sizes:
            rows += latency_rows(towers, batch, pairs, torch_device, torch_dtype, progress)
        # After all latencies: the processes that measure memory would disturb them.
        if memory:
            add_memory(rows, towers, device, dtype, used, progress)
    return {
        "model": model,
        # The reference is the first tower, if there is one.
        "against": towers[0].source if len(towers) > 1 else None,
        "rows": rows,
        "pairs": pairs,
        "device": device,
        "dtype": dtype,
        "threads": used,
        "seconds": time.perf_counter() - start,
    }
