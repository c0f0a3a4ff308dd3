"""Comparisons at several numbers of calibration pictures, as one record, page and plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ovsprune.core.files import write_text
from ovsprune.report.curves import COLOURS, MARKERS
from ovsprune.report.intervals import Spread, spread
from ovsprune.report.numbers import budget_name

__all__ = ["part", "spread_over", "write"]

Records = Mapping[int, Mapping[str, Any]]
FIGURES = {"retention": ("mIoU kept, %", 100.0), "relative_error": ("relative error", 1.0)}


SAME = ("model", "trained", "data", "centred", "images", "calibration", "budget", "protect",
        "round_to", "dense", "methods")  # fmt: skip


def part(record: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """What :func:`write` wrote, as the comparison at one of the numbers of pictures."""
    rows = [dict(row) for row in record["rows"] if row["samples"] == samples]
    for row in rows:
        del row["samples"]
    return {**record, "samples": samples, "rows": rows}


def write(records: Records, place: Path) -> None:
    """Write ``samples.json``, ``README.md`` and ``curves.png``.

    Args:
        records: Of :func:`ovsprune.compare`, by the number of pictures: of one model, on the same
            test pictures.
        place: A folder that is there.
    """
    first = next(iter(records.values()))
    record = {name: first[name] for name in SAME}
    record["ratios"], record["seeds"] = first["ratios"], first["seeds"]
    record["rows"] = [
        {"samples": samples, **row} for samples, part in records.items() for row in part["rows"]
    ]
    write_text(place / "samples.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_text(place / "README.md", "\n".join(_page(record, sorted(records))) + "\n")
    _draw(record, sorted(records), place / "curves.png")


def spread_over(seeds: int) -> str:
    """What the figures of a page are of.

    >>> spread_over(1), spread_over(3)
    ('one seed', '3 seeds: mean ± standard deviation')
    """
    return "one seed" if seeds == 1 else f"{seeds} seeds: mean ± standard deviation"


def _page(record: Mapping[str, Any], sizes: list[int]) -> Iterator[str]:
    yield f"# {record['model']}: number of calibration images"
    yield ""
    yield (
        f"Scored on {record['images']} images ({record['data']}), calibrated on "
        f"{record['calibration']}, {spread_over(record['seeds'])}. Fraction of "
        "the dense mIoU that is kept, and relative error of the dense features on the test "
        "images."
    )
    yield ""
    yield "![curves](curves.png)"
    for ratio in record["ratios"]:
        yield ""
        yield f"## {ratio:.0%} of the {budget_name(record['budget'])} removed"
        for figure, (label, scale) in FIGURES.items():
            yield ""
            yield f"| {label} | " + " | ".join(map(str, sizes)) + " |"
            yield "| --- |" + " ---: |" * len(sizes)
            for method in record["methods"]:
                found = [_spread(record, ratio, method, size, figure) for size in sizes]
                yield f"| {method} | " + " | ".join(_cell(one, scale) for one in found) + " |"


def _spread(
    record: Mapping[str, Any], ratio: float, method: str, size: int, figure: str
) -> Spread | None:
    values = [
        row[figure]
        for row in record["rows"]
        if (row["ratio"], row["method"], row["samples"]) == (ratio, method, size)
        and row[figure] is not None
    ]
    return spread(values) if values else None


def _cell(found: Spread | None, scale: float) -> str:
    if found is None:
        return ""
    digits = 1 if scale > 1 else 3
    deviation = "" if found.sd is None else f" ± {scale * found.sd:.{digits}f}"
    return f"{scale * found.mean:.{digits}f}{deviation}"


def _draw(record: Mapping[str, Any], sizes: list[int], path: Path) -> None:
    ratio = record["ratios"][-1]
    figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for axes, (name, (label, scale)) in zip(figure.subplots(1, 2), FIGURES.items(), strict=True):
        for number, method in enumerate(record["methods"]):
            found = {size: _spread(record, ratio, method, size, name) for size in sizes}
            points = {size: one for size, one in found.items() if one is not None}
            axes.errorbar(
                list(points),
                [scale * one.mean for one in points.values()],
                [scale * (one.sd or 0.0) for one in points.values()],
                color=COLOURS[number],
                marker=MARKERS[number],
                capsize=2,
                label=method,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("calibration images")
        axes.set_title(f"{label} ({ratio:.0%} removed)", loc="left", fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(path)
