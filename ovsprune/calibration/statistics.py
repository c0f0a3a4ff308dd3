"""What a survey has measured, kept: another ratio then costs only the plan and the refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ovsprune.calibration.kept import KeptFile
from ovsprune.core.records import Curves, Scores

__all__ = ["Statistics", "read_statistics", "statistics_file", "write_statistics"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a survey gave, and what it depended on.

    Attributes:
        scores: Costs and orders of removal.
        curves: Error by width, or None where no allocation asked for them.
        origin: Everything that the numbers depend on, as JSON values: the base's hash, the
            calibration's, the groups, the criterion, the seed.
    """

    scores: Scores
    curves: Curves | None
    origin: Mapping[str, Any]


def statistics_file(path: Path) -> KeptFile:
    """The file at ``path``, which need not be there yet."""
    return KeptFile(path, "ovsprune.statistics/1", "--statistics", "measured")


def write_statistics(path: Path, found: Statistics) -> None:
    """Write ``found`` to a safetensors file, whole or not at all.

    Raises:
        OutputError: ``path`` is a directory, or cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, costs in found.scores.costs.items():
        tensors[f"costs/{name}"] = costs
        tensors[f"order/{name}"] = found.scores.orders[name]
    if found.curves is not None:
        for name, widths in found.curves.widths.items():
            tensors[f"widths/{name}"] = widths
            tensors[f"errors/{name}"] = found.curves.errors[name]
    statistics_file(path).write(tensors, found.origin)


def read_statistics(path: Path, origin: Mapping[str, Any]) -> Statistics:
    """Read what :func:`write_statistics` wrote, if it was measured on the same things.

    Args:
        path: The file.
        origin: What the numbers must depend on; ``probe`` pictures of 0 ask for no curves.

    Raises:
        DataError: The file is damaged or no such file, or was measured on something else; says
            on what.
    """
    unasked = () if origin.get("probe") else ("probe",)
    tensors, stored = statistics_file(path).read(origin, unasked)

    def part(kind: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(f"{kind}/"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{kind}/")
        }

    curves = Curves(part("widths"), part("errors")) if part("widths") else None
    return Statistics(Scores(part("costs"), part("order")), curves, stored)
