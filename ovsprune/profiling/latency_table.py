"""Layer times of one machine, in a JSON file."""

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
    """Times of pieces of towers.

    Attributes:
        machine: On what, and how, they were measured; see :func:`this_machine`.
        times: Piece (its kind, and a digest of its shapes) to milliseconds by width.
    """

    machine: Mapping[str, Any]
    times: Mapping[str, Times] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """The table in ``path``.

        Raises:
            DataError: It cannot be read, or is no table of layer times.
        """
        try:
            data = json.loads(path.read_text("utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, not {FORMAT}")
            times = {piece: _times(entry) for piece, entry in data["times"].items()}
            return cls(dict(data["machine"]), times)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no table of layer times ({type(error).__name__}: {error}); delete it, "
                "or name another file with --latency-table: it is measured where it is missing"
            ) from error

    def write(self, path: Path) -> None:
        """Write the table to ``path``, complete or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        data = {
            "format": FORMAT,
            "machine": dict(self.machine),
            "times": {
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
    """What layer times depend on, apart from the layers' shapes."""
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
    """Where the user's cache directory has the table of ``machine``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = digest(json.dumps(machine, sort_keys=True))
    return Path(root) / "ovsprune" / "latency" / f"{name}.json"


def digest(text: str) -> str:
    """The first 12 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _times(entry: Mapping[str, Any]) -> dict[int, float]:
    times = {
        int(width): float(value)
        for width, value in zip(entry["widths"], entry["milliseconds"], strict=True)
    }
    if not times or not all(0 < value < float("inf") for value in times.values()):
        raise ValueError("times are milliseconds above 0")
    return dict(sorted(times.items()))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
