"""Rows of earlier comparisons, taken over: made on another machine, or in an earlier scratch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ovsprune.calibration.pictures import RENDERED
from ovsprune.comparison.results import Rows
from ovsprune.core.errors import DataError, OptionError

__all__ = ["Earlier", "take_over"]

Earlier = str | os.PathLike[str] | Mapping[str, Any]
"""The ``compare.json`` of a comparison, or what is in it."""

KEY = ("method", "ratio", "seed", "criterion", "allocation", "recovery", "source")
"""What makes a row one of its own; the parts are in it, so that a default may change."""

_SAME = ("model", "images", "samples", "budget", "protect", "round_to", "centred")
_NEAR = 1e-3
"""How far the dense tower's mIoU may be off on another machine."""


def take_over(earlier: Iterable[Earlier], now: Mapping[str, Any], rows: Rows) -> int:
    """Add the rows of earlier comparisons that are not among ``rows``.

    Args:
        earlier: The comparisons. Where their calibration pictures lay is not compared: folders have
            other names on another machine.
        now: What the record of this comparison says of model, pictures and options, with ``dense``.
        rows: Get more.

    Returns:
        How many were added.

    Raises:
        OptionError: A record is of another model, other pictures or other options.
        DataError: A file cannot be read, or is no record of a comparison.
    """
    read = [(source, _read(source)) for source in earlier]
    for source, record in read:
        _check(source, record, now)
    before = len(rows.rows)
    for _, record in read:
        for row in record["rows"]:
            if rows.find({name: row[name] for name in KEY}) is None:
                rows.add(dict(row))
    return len(rows.rows) - before


def _read(source: Earlier) -> Mapping[str, Any]:
    try:
        record = source if isinstance(source, Mapping) else json.loads(Path(source).read_text())
        whole = all(set(KEY) <= set(row) for row in record["rows"])
        if not whole or not {"macs", "params", "miou"} <= set(record["dense"]):
            raise KeyError("rows, dense")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{_named(source)} is no record of a comparison ({error!r}); name the compare.json "
            "that 'ovsprune compare' wrote"
        ) from error
    return record


def _check(source: Earlier, record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    pairs = {name: (record.get(name), now[name]) for name in _SAME}
    pairs |= {f"dense {k}": (record["dense"][k], now["dense"][k]) for k in ("macs", "params")}
    then, here = record["dense"]["miou"], now["dense"]["miou"]
    if abs(then - here) > _NEAR:
        pairs["dense mIoU"] = (then, here)
    kinds = (record.get("calibration"), now["calibration"])
    if set(kinds) & set(RENDERED):
        pairs["calibration"] = kinds
    other = [f"{name} {a}, now {b}" for name, (a, b) in pairs.items() if a != b]
    if other:
        raise OptionError(
            f"the rows of {_named(source)} are of another comparison ({'; '.join(other)})"
        )


def _named(source: Earlier) -> str:
    return "an earlier record" if isinstance(source, Mapping) else str(source)
