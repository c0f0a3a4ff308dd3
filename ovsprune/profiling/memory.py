"""Run as a fresh process: the peak memory of one tower in one forward pass, as JSON on stdout.

It is the size of the tower's weights plus what the pass adds to the process. On Linux the kernel
keeps a process's high-water mark of resident memory (``VmHWM``), which is set back just before the
pass. Elsewhere the mark of ``resource`` is used, which also saw the loading and may hide part of
the pass; without either there is no figure. On CUDA, PyTorch's allocator counts both.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["high_water", "peak_memory"]

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def peak_memory(task: dict[str, Any]) -> int | None:
    """Peak bytes of the model, batch size, device and dtype that ``task`` names."""
    import torch

    from ovsprune.backbones import load_backbone
    from ovsprune.profiling.timing import device_and_dtype, training_step

    if task["threads"] is not None:
        torch.set_num_threads(task["threads"])
    device, dtype = device_and_dtype(task["device"], task["dtype"])
    backbone = load_backbone(
        task["model"], pretrained=task["pretrained"], activation=task["activation"]
    )
    tower = backbone.tower.to(device, dtype).eval()
    size = backbone.preprocess.size
    # Only the tower counts: the text side goes.
    del backbone
    gc.collect()
    images = torch.zeros(task["batch"], 3, *size, device=device, dtype=dtype)
    # Weights may be mapped from their file: a page counts once it was read.
    tensors = [*tower.parameters(), *tower.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for tensor in tensors:
        tensor.sum()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_mark()
    before = _resident()
    if task["trained"] is None:
        with torch.inference_mode():
            tower(images)
    else:
        step = training_step(tower.train(), images, task["trained"])
        step()
        step()  # with the optimiser's state, which the first one makes
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    mark = high_water()
    return None if mark is None or before is None else weights + max(0, mark - before)


def _reset_mark() -> None:
    try:
        CLEAR.write_text("5")
    except OSError:
        # Not permitted here; the mark then also holds what loading took.
        return


def high_water() -> int | None:
    """High-water mark of this process's resident memory in bytes; None where nothing tells it."""
    return _status("VmHWM") or _rusage()


def _resident() -> int | None:
    """Resident memory in bytes, now; where that cannot be told, the high-water mark."""
    return _status("VmRSS") or _rusage()


def _status(key: str) -> int | None:
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def _rusage() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"peak": peak_memory(json.load(sys.stdin))}) + "\n")
