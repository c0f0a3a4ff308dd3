"""Rows of a comparison on disk: appended one by one, so that a run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ovsprune.calibration.pictures import RENDERED
from ovsprune.core.errors import DataError, OptionError, OutputError
from ovsprune.core.files import write_text

__all__ = ["KEY", "Earlier", "Rows", "check_place", "take_over"]

SETTINGS = "settings.json"
ROWS = "rows.jsonl"
OWN = (SETTINGS, ROWS, "compare.json", "README.md", "curves.png")
"""Files of a comparison; nothing else is ever removed."""

Row = dict[str, Any]

LATER = ("labelled pictures", "calibration pictures")
"""Settings that the first versions did not write: where they are missing, they are added."""


def check_place(place: Path) -> None:
    """Make sure that ``place`` can hold a comparison; asked before long work.

    Raises:
        OutputError: It is a file, or a directory with something else in it.
    """
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise OutputError(f"{place} is a file; name a directory with -o")
    if any(place.iterdir()) and not (place / SETTINGS).is_file():
        raise OutputError(f"{place} exists and holds no comparison; name another directory with -o")


class Rows:
    """The rows in ``place``.

    Args:
        place: Directory; made where it is missing.
        settings: What decides a row beside method, ratio and seed; plain JSON values. Rows of
            other settings do not belong into the same directory.
        overwrite: Start anew, whatever is there.

    Raises:
        OutputError: The directory holds rows of other settings, is damaged, or cannot be written.
    """

    def __init__(self, place: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.place = place
        check_place(place)
        try:
            place.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for name in OWN:
                    (place / name).unlink(missing_ok=True)
            if not (place / SETTINGS).is_file():
                text = json.dumps(settings, indent=2) + "\n"
                write_text(place / SETTINGS, text, remedy="name another directory with -o")
        except OSError as error:
            raise OutputError(
                f"{place} cannot be written ({error.strerror or error}); name another directory "
                "with -o"
            ) from error
        self._check(json.loads(json.dumps(settings)))
        self.rows = self._read()

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """The row that has all of ``key``'s values, or None."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        return None

    def add(self, row: Row) -> None:
        """Append ``row``; once this returns, it is on disk.

        Raises:
            OutputError: It cannot be written.
        """
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            with open(self.place / ROWS, "ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.place / ROWS} cannot be written ({error.strerror or error}); the rows "
                "before are kept, and the same command goes on from them"
            ) from error
        self.rows.append(row)

    def _check(self, settings: Mapping[str, Any]) -> None:
        path = self.place / SETTINGS
        try:
            written = json.loads(path.read_text("utf-8"))
            found = {**{k: v for k, v in settings.items() if k in LATER}, **written}
            other = [k for k in {**found, **settings} if found.get(k) != settings.get(k)]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} cannot be read ({error}); pass --overwrite to start anew"
            ) from error
        if other:
            plain = "the default"
            said = "; ".join(
                f"{k} {found.get(k, plain)}, now {settings.get(k, plain)}" for k in other
            )
            raise OutputError(
                f"{self.place} holds a comparison with other settings ({said}). Name another "
                "directory with -o, or pass --overwrite to start anew"
            )
        if found != written:
            write_text(path, json.dumps(found, indent=2) + "\n")

    def _read(self) -> list[Row]:
        path = self.place / ROWS
        if not path.is_file():
            return []
        *lines, rest = path.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                assert isinstance(row, dict)
            except (ValueError, AssertionError) as error:
                raise OutputError(
                    f"{path}, line {number} is damaged; remove the line, or pass --overwrite to "
                    "start anew"
                ) from error
            rows.append(row)
        if rest:  # A line without its end: the run was killed while it wrote.
            write_text(path, "".join(line.decode() + "\n" for line in lines))
        return rows


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
