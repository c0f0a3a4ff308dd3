"""What a survey has measured, kept: another ratio then costs only the plan and the refit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ovsprune.core.errors import DataError, OutputError
from ovsprune.core.records import Curves, Scores
from ovsprune.slim.write import save_tensors, staged_file

__all__ = ["Statistics", "check_place", "read_statistics", "write_statistics"]

_KIND = "ovsprune.statistics/1"


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


def check_place(path: Path) -> None:
    """Make sure that a file can be made at ``path``; asked before the long work.

    Raises:
        OutputError: It is a directory, or its directory cannot be made or written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory; --statistics names a file")
    above = next(place for place in path.absolute().parents if os.path.lexists(place))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(f"{above} cannot be written; name another file with --statistics")


def write_statistics(path: Path, found: Statistics) -> None:
    """Write ``found`` to a safetensors file, whole or not at all.

    Raises:
        OutputError: ``path`` is a directory, or cannot be written.
    """
    check_place(path)
    tensors: dict[str, Tensor] = {}
    for name, costs in found.scores.costs.items():
        tensors[f"costs/{name}"] = costs
        tensors[f"order/{name}"] = found.scores.orders[name]
    if found.curves is not None:
        for name, widths in found.curves.widths.items():
            tensors[f"widths/{name}"] = widths
            tensors[f"errors/{name}"] = found.curves.errors[name]
    with staged_file(path) as file:
        save_tensors(tensors, file, (_KIND, json.dumps(found.origin, sort_keys=True)))


def read_statistics(path: Path, origin: Mapping[str, Any]) -> Statistics:
    """Read what :func:`write_statistics` wrote, if it was measured on the same things.

    Args:
        path: The file.
        origin: What the numbers must depend on; ``probe`` pictures of 0 ask for no curves.

    Raises:
        DataError: The file is damaged or no such file, or was measured on something else; says
            on what.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as statistics: {error}") from error
    if _KIND not in notes:
        raise DataError(
            f"{path} holds no {_KIND} (its header says {', '.join(notes) or 'nothing'}): name "
            "another file, or delete it to measure anew"
        )
    try:
        stored = dict(json.loads(notes[_KIND]))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} does not say what it was measured on ({error}): delete it to measure anew"
        ) from error
    wanted = json.loads(json.dumps(origin))
    differing = [
        f"{key} is {stored.get(key)!r} there and {value!r} here"
        for key, value in wanted.items()
        if stored.get(key) != value and not (key == "probe" and value == 0)
    ]
    if differing:
        raise DataError(
            f"{path} was measured on something else: {'; '.join(differing)}. Name another file, or "
            "delete it to measure anew"
        )

    def part(kind: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(f"{kind}/"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{kind}/")
        }

    curves = Curves(part("widths"), part("errors")) if part("widths") else None
    return Statistics(Scores(part("costs"), part("order")), curves, stored)
