"""Latency in alternating passes, and peak memory in a new process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, WeightsError
from ovsprune.core.progress import Progress, Silent

__all__ = [
    "DTYPES",
    "Pass",
    "alternate",
    "device_and_dtype",
    "latency_figures",
    "output_loss",
    "paired_speedup",
    "peak_memory",
    "random_images",
    "thread_limit",
    "training_step",
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Data types of a tower by name."""

Pass = Callable[[], Any]
"""Function to time; it runs once and its result is ignored."""


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype with these names.

    Raises:
        OptionError: The dtype is unknown, or the device is not available.
    """
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown; give one of {', '.join(DTYPES)}")
    try:
        torch_device = torch.device(device)
        # torch.device accepts a device that is not there; an allocation does not.
        torch.empty(1, device=torch_device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"--device {device!r} cannot be used here ({reason}); 'cpu' is always available"
        ) from error
    return torch_device, DTYPES[dtype]


@contextmanager
def thread_limit(threads: int | None) -> Iterator[int]:
    """Use ``threads`` CPU threads in the block (None: unchanged); yield the number in use.

    Raises:
        OptionError: ``threads`` is less than 1.
    """
    if threads is not None and threads < 1:
        raise OptionError(f"--threads {threads} is out of range; give 1 or more")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def alternate(
    passes: Mapping[str, Pass],
    *,
    rounds: int = 20,
    warmup: int = 2,
    device: torch.device | None = None,
    progress: Progress | None = None,
    label: str = "latency",
) -> dict[str, list[float]]:
    """Time several passes in alternation, so that load on the machine affects all equally.

    Args:
        passes: Name to the function to time.
        rounds: Rounds; each round times each pass once.
        warmup: Rounds that do not count.
        device: Device to synchronise before the clock is read.
        progress: Progress reporter.
        label: Name of the stage.

    Returns:
        Name to ``rounds`` times in seconds; entries of equal index belong to one round.
    """
    times: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    with (progress or Silent()).stage(label, rounds + warmup) as advance, torch.inference_mode():
        for number in range(rounds + warmup):
            # Rotate the order, because a pass is affected by the caches that the last one left.
            first = number % len(names)
            for name in names[first:] + names[:first]:
                _synchronise(device)
                start = time.perf_counter()
                passes[name]()
                _synchronise(device)
                if number >= warmup:
                    times[name].append(time.perf_counter() - start)
            advance(1)
    return times


def paired_speedup(dense: Sequence[float], slim: Sequence[float]) -> float:
    """Return the median over the rounds of dense time / slim time."""
    return statistics.median(a / b for a, b in zip(dense, slim, strict=True))


def latency_figures(
    times: Mapping[str, Sequence[float]], name: str, reference: str, batch: int
) -> dict[str, float]:
    """Return the figures of one pass for a record.

    Args:
        times: Result of :func:`alternate`.
        name: Name of the pass.
        reference: Name of the pass that it is compared with.
        batch: Images per pass.

    Returns:
        ``latency`` (median, in seconds), ``throughput`` (images/s) and ``speedup``.
    """
    latency = statistics.median(times[name])
    return {
        "latency": latency,
        "throughput": batch / latency,
        "speedup": paired_speedup(times[reference], times[name]),
    }


def random_images(batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Return normally distributed images [batch, 3, height, width], the same for equal seeds."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        # CUDA kernels run asynchronously.
        torch.cuda.synchronize(device)


def peak_memory(
    model: str,
    batch: int,
    *,
    pretrained: str | None = None,
    activation: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    trained: Sequence[str] | None = None,
) -> int | None:
    """Measure the peak memory in bytes of a forward pass: weights and activations.

    With ``trained`` (names of parameters), training steps of AdamW on these parameters are measured
    instead, including gradients and the optimiser's state. The measurement runs in a new process
    (:mod:`ovsprune.profiling.memory`). On CUDA it is the peak of PyTorch's allocator.

    Returns:
        Bytes, or None if the system does not report them.

    Raises:
        WeightsError: The process failed, although the model loaded here.
    """
    task = {
        "model": model, "batch": batch, "pretrained": pretrained, "activation": activation,
        "device": device, "dtype": dtype, "threads": threads,
        "trained": None if trained is None else list(trained),
    }  # fmt: skip
    # glibc raises its mmap threshold and then keeps freed memory; a fixed one returns it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "ovsprune.profiling.memory"]
    done = subprocess.run(
        command, input=json.dumps(task), env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise WeightsError(
            f"the process that measures the memory of {model!r} failed ({lines[-1]}); "
            "smaller batches need less memory"
        )
    # Libraries may print something before the result.
    peak = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
    return int(peak) if peak is not None else None


def training_step(tower: nn.Module, images: Tensor, names: Sequence[str]) -> Pass:
    """Return a function that runs one step of AdamW on the named parameters alone.

    Args:
        tower: Image tower, in training mode.
        images: Batch [B, 3, H, W].
        names: Parameters to train; may be empty.
    """
    chosen, optimizers = set(names), list[torch.optim.Optimizer]()

    # lr=0: the weights stay the same, so every step costs the same.

    def step() -> None:
        # alternate() times in inference mode; a training step needs gradients.
        with torch.inference_mode(False), torch.enable_grad():
            for name, parameter in tower.named_parameters():
                parameter.requires_grad_(name in chosen)
                parameter.grad = None
            loss = output_loss(tower, images)
            # Without parameters to train, the step is a forward pass.
            if not chosen:
                return
            loss.backward()  # type: ignore[no-untyped-call]
            # In the first step, as the gradient flags are set in it.
            if not optimizers:
                trained = [p for p in tower.parameters() if p.requires_grad]
                optimizers.append(torch.optim.AdamW(trained, lr=0.0))
            optimizers[0].step()

    return step


def output_loss(tower: nn.Module, images: Tensor) -> Tensor:
    """Return the mean square of the pooled output: a scalar that depends on all of it."""
    output = tower(images)
    # Towers of open_clip may return (pooled, tokens).
    output = output[0] if isinstance(output, tuple) else output
    loss: Tensor = output.float().square().mean()
    return loss
