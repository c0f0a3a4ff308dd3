"""Run as a fresh process: the peak memory of one tower in one forward pass, as JSON on stdout.

On Linux the kernel keeps a process's high-water mark of resident memory (``VmHWM``). It is set
back after the tower is loaded, and what the process held before the tower was built (the
interpreter, the libraries) is taken off. Without that file the mark of ``resource`` is used, which
also sees the loading; without either there is no figure.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["measure"]

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def measure(task: dict[str, Any]) -> int | None:
    """Peak bytes of the model, batch size, device and dtype that ``task`` names."""
    import torch

    from ovsprune.backbones import load
    from ovsprune.jobs.measure import device_and_dtype

    if task["threads"] is not None:
        torch.set_num_threads(task["threads"])
    device, dtype = device_and_dtype(task["device"], task["dtype"])
    _warm_up(device)
    before = _resident()
    backbone = load(task["model"], pretrained=task["pretrained"], activation=task["activation"])
    tower = backbone.tower.to(device, dtype).eval()
    size = backbone.preprocess.size
    # Only the tower counts: the text side goes.
    del backbone
    gc.collect()
    images = torch.zeros(task["batch"], 3, *size, device=device, dtype=dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_mark()
    with torch.inference_mode():
        tower(images)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    mark = _mark()
    return None if mark is None or before is None else max(0, mark - before)


def _warm_up(device: Any) -> None:
    """Load the libraries and kernels that any tower needs, so that they count as nobody's."""
    import open_clip  # noqa: F401
    import torch
    from torch import nn

    layer = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(8 * 16, 8))
    layer.to(device)(torch.zeros(2, 3, 16, 16, device=device))


def _reset_mark() -> None:
    try:
        CLEAR.write_text("5")
    except OSError:
        # Not permitted here; the mark then also holds what loading took.
        return


def _mark() -> int | None:
    """High-water mark of resident memory in bytes."""
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
    sys.stdout.write(json.dumps({"peak": measure(json.loads(sys.argv[1]))}) + "\n")
