"""Summary of a comparison: terminal tables and Markdown page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ovsprune.report.intervals import pooled_difference, spread
from ovsprune.report.numbers import budget_name, count, duration, percent
from ovsprune.report.tables import table

__all__ = ["compare_summary", "differences", "makers", "page", "summary"]

Record = Mapping[str, Any]
FIGURES = ("retention", "miou", "pixel_accuracy", "relative_error")


def summary(record: Record) -> list[dict[str, Any]]:
    """Return means over seeds, one entry per ratio and method, in the order of the record.

    Returns:
        ``method, ratio, seeds`` (number of finished rows), ``macs`` and ``params`` (means), for
        each of ``retention, miou, pixel_accuracy, relative_error`` a ``{mean, sd, half}`` (half is
        the half-width of the 95% interval of the mean; None without enough values), ``seconds``
        (mean) and ``reason`` (of missing rows, or None).
    """
    entries = []
    for ratio in record["ratios"]:
        for method in record["methods"]:
            rows = _rows(record, ratio, method)
            done = [row for row in rows if row["status"] == "done"]
            entry: dict[str, Any] = {"method": method, "ratio": ratio, "seeds": len(done)}
            for cost in ("macs", "params", "seconds"):
                entry[cost] = _figure(_values(done, cost))["mean"]
            for figure in FIGURES:
                entry[figure] = _figure(_values(done, figure))
            entry["reason"] = next((row["reason"] for row in rows if row["reason"]), None)
            entries.append(entry)
    return entries


def differences(record: Record, reference: str) -> list[dict[str, Any]]:
    """Return the difference of ``reference`` to every other method, with pooled 95% intervals.

    Returns:
        ``ratio, reference, method``, and for ``retention`` and ``relative_error`` a ``{mean, half,
        clear}`` of reference minus method; ``clear`` is True if the interval excludes zero.
        Methods without rows are omitted.
    """
    entries = []
    for ratio in record["ratios"]:
        for method in record["methods"]:
            entry: dict[str, Any] = {"ratio": ratio, "reference": reference, "method": method}
            for figure in ("retention", "relative_error"):
                ours = _values(_rows(record, ratio, reference), figure)
                theirs = _values(_rows(record, ratio, method), figure)
                if ours and theirs and method != reference:
                    gap = pooled_difference(ours, theirs)
                    entry[figure] = {"mean": gap.mean, "half": gap.half, "clear": gap.clear}
            if "retention" in entry:
                entries.append(entry)
    return entries


def compare_summary(record: Record) -> Sequence[RenderableType]:
    """Return one table per ratio, the differences, and the paths of the files."""
    columns = ["", *_columns(record)]
    parts: list[RenderableType] = []
    for ratio in record["ratios"]:
        title = f"{record['model']}, {_removed(record, ratio)}"
        parts.append(table(title, columns, _cells(record, ratio)))
    gaps = _gaps(record)
    if gaps:
        parts.append(table(_gap_title(record), GAP_COLUMNS, gaps))
    lines = [_dense_line(record), NOTE]
    lines += [f"{name}: {reason}" for name, reason in _reasons(record)]
    lines += ["", f"Done in {duration(record['seconds'])}: {record['output']}/README.md"]
    if record["plot"]:
        lines.append(f"Plot: {record['plot']}")
    return [*parts, Text("\n".join(lines))]


def page(record: Record) -> str:
    """Return the tables as a Markdown page."""
    lines = [f"# {record['model']}: methods compared", "", _dense_line(record), ""]
    if not record["trained"]:
        lines += ["**The weights are random: the quality figures are meaningless.**", ""]
    lines += [
        f"{record['samples']} calibration images ({record['calibration']}), {record['seeds']} "
        f"{'seed' if record['seeds'] == 1 else 'seeds'}; mean ± standard deviation over seeds. "
        f"{NOTE}{_options(record)}",
        "",
    ]
    if record["plot"]:
        lines += [f"![Quality against {budget_name(record['budget'])}](curves.png)", ""]
    for ratio in record["ratios"]:
        lines += [f"## {_removed(record, ratio)}", ""]
        lines += [*_markdown(["method", *_columns(record)], _cells(record, ratio)), ""]
    gaps = _gaps(record)
    if gaps:
        # Options of a method may be patterns with asterisks.
        title = _gap_title(record).replace("*", "\\*")
        lines += [f"## {title}", "", *_markdown(GAP_COLUMNS, gaps), ""]
        lines += ["Difference of the means ± half-width of the pooled 95% interval.", ""]
    reasons = _reasons(record)
    if reasons:
        lines += ["## Not reached", "", *(f"- `{name}`: {reason}" for name, reason in reasons), ""]
    versions = [
        f"{name} ({number} {'row' if number == 1 else 'rows'})"
        for name, number in makers(record["rows"]).items()
    ]
    return "\n".join([*lines, f"Made by {'; '.join(versions)}.", ""])


def makers(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Count the rows by the version that made them, most frequent first."""
    counts = Counter(row.get("made_by", "an unknown version") for row in rows)
    # A Counter iterates in the order of insertion, so the most frequent comes first.
    return Counter(dict(counts.most_common()))


GAP_COLUMNS = ["against", "removed", "kept, points", "error"]
NOTE = (
    "kept: fraction of the dense mIoU; error: relative error of the dense features on the same "
    "images, 0 is equal."
)


def _columns(record: Record) -> tuple[str, ...]:
    return ("seeds", budget_name(record["budget"]), "kept", "mIoU", "error", "time")


def _removed(record: Record, ratio: float) -> str:
    return f"{percent(ratio, 0)} of the {budget_name(record['budget'])} removed"


def _options(record: Record) -> str:
    """Return the options that differ from the defaults as a sentence, or an empty string."""
    options = [f"--protect {pattern}" for pattern in record["protect"]]
    options += [f"--round-to {record['round_to']}"] if record["round_to"] > 1 else []
    options += ["--centred"] if record["centred"] else []
    return f" Options: `{' '.join(options)}`." if options else ""


def _cells(record: Record, ratio: float) -> list[list[str]]:
    """Return one row per method, sorted by mIoU, with unreached budgets last."""
    entries = [e for e in record["summary"] if e["ratio"] == ratio]
    # mIoU is in [0, 1]: the offset puts all entries with a value before those without.
    entries.sort(key=lambda e: -1.0 if e["miou"]["mean"] is None else -e["miou"]["mean"] - 2.0)
    return [
        [
            entry["method"],
            str(entry["seeds"]),
            count(entry[record["budget"]]),
            _points(entry["retention"]),
            _points(entry["miou"]),
            _error(entry["relative_error"]),
            duration(entry["seconds"]),
        ]
        if entry["seeds"]
        else [entry["method"], "0", "not reached", "", "", "", ""]
        for entry in entries
    ]


def _gaps(record: Record) -> list[list[str]]:
    cells = []
    for gap in record["differences"]:
        kept, error = gap["retention"], gap.get("relative_error")
        cells.append(
            [
                gap["method"],
                percent(gap["ratio"], 0),
                # In percentage points; `and` keeps a half-width of None.
                _signed(100 * kept["mean"], kept["half"] and 100 * kept["half"], ".1f"),
                _signed(error["mean"], error["half"], ".3f") if error else "",
            ]
        )
    return cells


def _gap_title(record: Record) -> str:
    return f"{record['differences'][0]['reference']} minus the other methods, with 95% intervals"


def _signed(mean: float, half: float | None, form: str) -> str:
    return f"{mean:+{form}}" + ("" if half is None else f" ± {half:{form}}")


def _points(figure: Record) -> str:
    if figure["mean"] is None:
        return "n/a"
    sd = "" if figure["sd"] is None else f" ± {100 * figure['sd']:.1f}"
    return f"{100 * figure['mean']:.1f}%{sd}"


def _error(figure: Record) -> str:
    sd = "" if figure["sd"] is None else f" ± {figure['sd']:.3f}"
    return f"{figure['mean']:.3f}{sd}"


def _dense_line(record: Record) -> str:
    dense, scenes = record["dense"], record["data"] == "scenes"
    images = "procedural test scenes" if scenes else f"images of {record['data']}"
    return (
        f"Dense: {count(dense['macs'])} MACs, {count(dense['params'])} parameters, mIoU "
        f"{percent(dense['miou'])} on {record['images']} {images}."
    )


def _reasons(record: Record) -> list[tuple[str, str]]:
    return [
        (f"{entry['method']} at {entry['ratio']:g}", entry["reason"])
        for entry in record["summary"]
        if entry["reason"]
    ]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table; asterisks in patterns are escaped."""
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return lines + ["| " + " | ".join(row).replace("*", "\\*") + " |" for row in rows]


def _rows(record: Record, ratio: float, method: str) -> list[Record]:
    return [r for r in record["rows"] if r["ratio"] == ratio and r["method"] == method]


def _values(rows: Sequence[Record], figure: str) -> list[float]:
    return [float(row[figure]) for row in rows if row[figure] is not None]


def _figure(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "sd": None, "half": None}
    figure = spread(values)
    return {"mean": figure.mean, "sd": figure.sd, "half": figure.half}
