"""Table of layer times of one machine, stored as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ovsprune.core.errors import DataError
from ovsprune.core.files import write_text

__all__ = ["LatencyTable", "cache_path", "digest", "this_machine"]

FORMAT = 1

Times = Mapping[int, float]
"""Width to milliseconds."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of the pieces of towers.

    Attributes:
        machine: Conditions of the measurement; see :func:`this_machine`.
        times: Piece (its kind, and a digest of its shapes) to milliseconds by width.
    """

    machine: Mapping[str, Any]
    times: Mapping[str, Times] = field(default_factory=dict)

    def extended(self, measured: Mapping[tuple[str, int], float]) -> LatencyTable:
        """Return a table with more times, given as (piece, width) to milliseconds."""
        times = {piece: dict(by_width) for piece, by_width in self.times.items()}
        for (piece, width), value in measured.items():
            times.setdefault(piece, {})[width] = value
        return LatencyTable(self.machine, {p: dict(sorted(t.items())) for p, t in times.items()})

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """Read the table in ``path``.

        Raises:
            DataError: The file cannot be read, or is no table of layer times.
        """
        try:
            data = json.loads(path.read_text("utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format is {data['format']!r}, expected {FORMAT}")
            times = {piece: _times(entry) for piece, entry in data["times"].items()}
            return cls(dict(data["machine"]), times)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no table of layer times ({type(error).__name__}: {error}); delete it "
                "to measure again, or name another file with --latency-table"
            ) from error

    def write(self, path: Path) -> None:
        """Write the table to ``path`` atomically.

        Raises:
            OutputError: The file cannot be written.
        """
        data = {
            "format": FORMAT,
            "machine": dict(self.machine),
            "times": {
                # Two lists, because JSON would turn widths as keys into strings.
                piece: {"widths": list(times), "milliseconds": list(times.values())}
                for piece, times in sorted(self.times.items())
            },
        }
        write_text(
            path,
            json.dumps(data, indent=1) + "\n",
            what=f"the table of layer times {path}",
            remedy="name another file with --latency-table",
        )


def this_machine(
    device: torch.device, dtype: torch.dtype, batch: int, size: tuple[int, int]
) -> dict[str, Any]:
    """Return the conditions that layer times depend on, besides the layers' shapes."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "size": list(size),
    }


def cache_path(machine: Mapping[str, Any]) -> Path:
    """Return the path of the table of ``machine`` in the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # Sorted keys: equal conditions give the same file.
    name = digest(json.dumps(machine, sort_keys=True))
    return Path(root) / "ovsprune" / "latency" / f"{name}.json"


def digest(text: str) -> str:
    """Return the first 12 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _times(entry: Mapping[str, Any]) -> dict[int, float]:
    times = {
        int(width): float(value)
        for width, value in zip(entry["widths"], entry["milliseconds"], strict=True)
    }
    # Python reads NaN and Infinity from JSON; the comparisons refuse both.
    if not times or not all(0 < value < float("inf") for value in times.values()):
        raise ValueError("times must be finite milliseconds above 0")
    return dict(sorted(times.items()))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    # On Linux, platform.processor() is often empty or only "x86_64".
    return next(names, "") or platform.processor() or platform.machine()
