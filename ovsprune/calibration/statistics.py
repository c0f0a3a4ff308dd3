"""File of measured statistics, with which a second prune only needs the plan and the refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ovsprune.calibration.result_file import ResultFile
from ovsprune.core.records import Curves, Scores

__all__ = ["Statistics", "read_statistics", "statistics_file", "write_statistics"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Result of a survey, with everything that it depends on.

    Attributes:
        scores: Costs and orders of removal.
        curves: Error by width; None if the allocation did not need curves.
        origin: Everything that the numbers depend on, as JSON values: hashes of the base model and
            of the calibration images, groups, criterion, seed.
    """

    scores: Scores
    curves: Curves | None
    origin: Mapping[str, Any]


def statistics_file(path: Path) -> ResultFile:
    """Return the file at ``path``, which need not exist yet."""
    return ResultFile(path, "ovsprune.statistics/1", "--statistics", "measured")


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write ``statistics`` to a safetensors file, atomically.

    Raises:
        OutputError: ``path`` is a directory, or cannot be written.
    """
    scores, curves = statistics.scores, statistics.curves
    by_kind = {"costs": scores.costs, "order": scores.orders}
    if curves is not None:
        by_kind |= {"widths": curves.widths, "errors": curves.errors}
    tensors = {
        f"{kind}/{name}": tensor for kind, t in by_kind.items() for name, tensor in t.items()
    }
    statistics_file(path).write(tensors, statistics.origin)


def read_statistics(path: Path, origin: Mapping[str, Any]) -> Statistics:
    """Read a file of :func:`write_statistics`, if its origin is the same.

    Args:
        path: The file.
        origin: Required origin. If ``probe`` is 0, curves are not needed and may be present.

    Raises:
        DataError: The file cannot be read, or has another origin; the message names the
            differences.
    """
    ignored = () if origin.get("probe") else ("probe",)
    tensors, stored = statistics_file(path).read(origin, ignored)

    def by_group(kind: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(f"{kind}/"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{kind}/")
        }

    widths = by_group("widths")
    curves = Curves(widths, by_group("errors")) if widths else None
    return Statistics(Scores(by_group("costs"), by_group("order")), curves, stored)
