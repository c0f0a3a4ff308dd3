"""Files of a comparison: rows, appended one by one so that a run can be resumed, and the record."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ovsprune.calibration.pictures import RENDERED
from ovsprune.core.errors import DataError, MissingLibraryError, OptionError, OutputError
from ovsprune.core.files import write_text
from ovsprune.core.progress import Progress
from ovsprune.report.comparison import page

__all__ = ["KEY", "Earlier", "Row", "Rows", "check_place", "import_rows", "write_record"]

SETTINGS = "settings.json"
ROWS = "rows.jsonl"
FILES = (SETTINGS, ROWS, "compare.json", "README.md", "curves.png")
"""Files of a comparison; no other file is ever removed."""

Row = dict[str, Any]

LATER = ("labelled pictures", "calibration pictures")
"""Settings that the first versions did not write; they are added if they are missing."""

KEY = ("method", "ratio", "seed", "criterion", "allocation", "recovery", "source")
"""Values that identify a row. The parts of a method are included, so that a default may change."""


def check_place(place: Path) -> None:
    """Check that ``place`` can hold a comparison; call this before long work.

    Raises:
        OutputError: It is a file, or a directory with something else in it.
    """
    # A broken link counts as existing, because no directory can be made in its place.
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise OutputError(f"{place} is a file; name a directory with -o")
    if any(place.iterdir()) and not (place / SETTINGS).is_file():
        raise OutputError(f"{place} exists and holds no comparison; name another directory with -o")


class Rows:
    """Stored rows of a comparison.

    Args:
        place: Directory of the rows; created if it is missing.
        settings: Everything that a row depends on besides method, ratio and seed, as JSON values.
            All rows in a directory have the same settings.
        overwrite: Delete an existing comparison first.

    Raises:
        OutputError: The directory holds rows of other settings, is damaged, or cannot be written.
    """

    def __init__(self, place: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.place = place
        check_place(place)
        try:
            place.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for name in FILES:
                    (place / name).unlink(missing_ok=True)
            if not (place / SETTINGS).is_file():
                text = json.dumps(settings, indent=2) + "\n"
                write_text(place / SETTINGS, text, remedy="name another directory with -o")
        except OSError as error:
            raise OutputError(
                f"{place} cannot be written ({error.strerror or error}); name another directory "
                "with -o"
            ) from error
        # Through JSON, because tuples differ from the lists in the file.
        self._check_settings(json.loads(json.dumps(settings)))
        self.rows = self._read()

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """Return the first row that has all values of ``key``, or None."""
        matches = (row for row in self.rows if all(row.get(k) == v for k, v in key.items()))
        return next(matches, None)

    def add(self, row: Row) -> None:
        """Append ``row``; it is on the disk when this returns.

        Raises:
            OutputError: The row cannot be written.
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
                "before are kept, and the same command resumes the comparison"
            ) from error
        self.rows.append(row)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.place / SETTINGS
        try:
            written = json.loads(path.read_text("utf-8"))
            stored = {**{k: v for k, v in settings.items() if k in LATER}, **written}
            differing = [k for k in {**stored, **settings} if stored.get(k) != settings.get(k)]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} cannot be read ({error}); pass --overwrite to start anew"
            ) from error
        if differing:
            values = "; ".join(
                f"{k} {stored.get(k, 'the default')}, now {settings.get(k, 'the default')}"
                for k in differing
            )
            raise OutputError(
                f"{self.place} holds a comparison with other settings ({values}). Name another "
                "directory with -o, or pass --overwrite to start anew"
            )
        # Complete a file of the first versions, so that a later change is noticed.
        if stored != written:
            write_text(path, json.dumps(stored, indent=2) + "\n")

    def _read(self) -> list[Row]:
        path = self.place / ROWS
        if not path.is_file():
            return []
        # `rest` is empty if the last line is complete.
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
        if rest:  # The last line is incomplete, because the run was killed while it wrote.
            write_text(path, "".join(line.decode() + "\n" for line in lines))
        return rows


Earlier = str | os.PathLike[str] | Mapping[str, Any]
"""Path of the ``compare.json`` of a comparison, or its contents."""

_SAME = ("model", "images", "samples", "budget", "protect", "round_to", "centred")
_MIOU_TOLERANCE = 1e-3
"""Maximum difference of the dense tower's mIoU between two machines."""


def import_rows(earlier: Iterable[Earlier], record: Mapping[str, Any], rows: Rows) -> None:
    """Add the rows of earlier comparisons that are not among ``rows``.

    Args:
        earlier: Earlier comparisons. Paths of their calibration images are not compared, because
            folders have other names on another machine.
        record: Model, images and options of this comparison, and the scores of ``dense``.
        rows: Rows to extend.

    Raises:
        OptionError: A comparison is of another model, other images or other options.
        DataError: A file cannot be read, or is no record of a comparison.
    """
    # All records are checked before the first row is added.
    records = [_record_of(source, record) for source in earlier]
    for row in (row for imported in records for row in imported["rows"]):
        if rows.find({name: row[name] for name in KEY}) is None:
            rows.add(dict(row))


def _record_of(source: Earlier, now: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the record of an earlier comparison, which must agree with ``now``."""
    name = "an earlier record" if isinstance(source, Mapping) else str(source)
    try:
        record = source if isinstance(source, Mapping) else json.loads(Path(source).read_text())
        complete = all(set(KEY) <= set(row) for row in record["rows"])
        if not complete or not {"macs", "params", "miou"} <= set(record["dense"]):
            raise KeyError("rows, dense")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{name} is no record of a comparison ({error!r}); name the compare.json that "
            "'ovsprune compare' wrote"
        ) from error
    pairs = {key: (record.get(key), now[key]) for key in _SAME}
    pairs |= {f"dense {k}": (record["dense"][k], now["dense"][k]) for k in ("macs", "params")}
    mious = (record["dense"]["miou"], now["dense"]["miou"])
    if abs(mious[0] - mious[1]) > _MIOU_TOLERANCE:
        pairs["dense mIoU"] = mious
    calibrations = (record.get("calibration"), now["calibration"])
    # Unlike a folder, a rendered kind has the same name on every machine.
    if set(calibrations) & set(RENDERED):
        pairs["calibration"] = calibrations
    differing = [f"{key} {a}, now {b}" for key, (a, b) in pairs.items() if a != b]
    if differing:
        raise OptionError(f"the rows of {name} are of another comparison ({'; '.join(differing)})")
    return record


def write_record(
    record: dict[str, Any], place: Path, start: float, progress: Progress
) -> dict[str, Any]:
    """Write plot, page and record to ``place``; return the record with ``plot, output, seconds``.

    Args:
        record: Record of the comparison, with its summary.
        place: Directory of the rows.
        start: Value of ``time.perf_counter()`` at the start of the comparison.
        progress: Progress reporter.

    Raises:
        OutputError: A file cannot be written.
    """
    from ovsprune.report.curves import draw

    record["plot"] = str(place / "curves.png")
    try:
        draw(record, place / "curves.png")
    except MissingLibraryError as error:
        progress.note(f"no plot: {error}")
        record["plot"] = None
    record["output"] = str(place)
    record["seconds"] = time.perf_counter() - start
    write_text(place / "README.md", page(record))
    write_text(place / "compare.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    return record
