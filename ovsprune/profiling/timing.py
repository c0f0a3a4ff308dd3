"""Measuring on this machine: latency in alternating passes, peak memory in a fresh process."""

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
    "alternate",
    "device_and_dtype",
    "output_loss",
    "paired_speedup",
    "peak_memory",
    "thread_limit",
    "training_step",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Pass = Callable[[], Any]


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of those names.

    Raises:
        OptionError: There is no such dtype, or no such device on this machine.
    """
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown; give one of {', '.join(DTYPES)}")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"--device {device!r} cannot be used here ({reason}); 'cpu' always can"
        ) from error
    return found, DTYPES[dtype]


@contextmanager
def thread_limit(threads: int | None) -> Iterator[int]:
    """Use ``threads`` CPU threads in the block (None: as it is); yields how many are used.

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
    """Time several things in turn, so that a busy machine is busy for all of them.

    Args:
        passes: Name to what is timed.
        rounds: How often each is timed; one round times each once.
        warmup: Rounds that are not counted.
        device: Synchronised before a clock is read, where it is asynchronous.
        progress: Told of each round.
        label: Name of the stage.

    Returns:
        Name to ``rounds`` times in seconds; the entries of one place belong to one round.
    """
    times: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    with (progress or Silent()).stage(label, rounds + warmup) as advance, torch.inference_mode():
        for number in range(rounds + warmup):
            # Each goes first as often as any other: what a pass leaves in the caches is shared.
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
    """Median over the rounds of dense time / slim time."""
    return statistics.median(a / b for a, b in zip(dense, slim, strict=True))


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
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
    """Most memory in bytes that a tower holds in one forward pass: weights and activations.

    With ``trained``, names of parameters, it is that of training steps of AdamW which train those:
    gradients and the optimiser's state count, too.

    Measured by :mod:`ovsprune.profiling.memory` in a fresh process, so that nothing that ran before
    counts. On a CUDA device it is the most that PyTorch's allocator held.

    Returns:
        Bytes, or None where the system does not tell.

    Raises:
        WeightsError: The process failed, although the model loaded here.
    """
    task = {
        "model": model, "batch": batch, "pretrained": pretrained, "activation": activation,
        "device": device, "dtype": dtype, "threads": threads,
        "trained": None if trained is None else list(trained),
    }  # fmt: skip
    # glibc keeps what is freed below a threshold that it moves; a fixed one gives memory back.
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

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            for name, parameter in tower.named_parameters():
                parameter.requires_grad_(name in chosen)
                parameter.grad = None
            loss = output_loss(tower, images)
            if not chosen:
                return
            loss.backward()  # type: ignore[no-untyped-call]
            if not optimizers:
                trained = [p for p in tower.parameters() if p.requires_grad]
                optimizers.append(torch.optim.AdamW(trained, lr=0.0))
            optimizers[0].step()

    return step


def output_loss(tower: nn.Module, images: Tensor) -> Tensor:
    """Return the mean square of the pooled output: a scalar that depends on all of it."""
    output = tower(images)
    output = output[0] if isinstance(output, tuple) else output
    loss: Tensor = output.float().square().mean()
    return loss
