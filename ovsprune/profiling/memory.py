"""Peak memory of one tower, measured as the main module of a new process; prints JSON.

The result is the size of the weights plus the memory that the pass adds. On Linux the kernel's
high-water mark of resident memory (``VmHWM``) is reset just before the pass. Elsewhere the mark of
``resource`` is used, which includes loading and may hide part of the pass. On CUDA, PyTorch's
allocator counts both.
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
    """Return the peak bytes for the model, batch size, device and dtype in ``task``."""
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
    # Free the text tower, which does not count.
    del backbone
    gc.collect()
    images = torch.zeros(task["batch"], 3, *size, device=device, dtype=dtype)
    # Memory-mapped weights are not resident before they are read once.
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
        step()  # the first step creates the optimiser's state
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    mark = high_water()
    return None if mark is None or before is None else weights + max(0, mark - before)


def _reset_mark() -> None:
    try:
        CLEAR.write_text("5")  # 5 resets VmHWM, see proc(5)
    except OSError:
        # Not permitted: the mark then includes the memory used for loading.
        return


def high_water() -> int | None:
    """Return the high-water mark of resident memory in bytes, or None if unavailable."""
    return _status("VmHWM") or _rusage()


def _resident() -> int | None:
    """Return the resident memory in bytes, or the high-water mark if unavailable."""
    return _status("VmRSS") or _rusage()


def _status(key: str) -> int | None:
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024  # the unit kB of /proc is 1024 bytes
    return None


def _rusage() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    # ru_maxrss is in bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"peak": peak_memory(json.load(sys.stdin))}) + "\n")
