"""Plot of quality against cost: one labelled curve per method with a band over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovsprune.report.figures import new_figure, save
from ovsprune.report.numbers import budget_name, count

__all__ = ["draw", "spread_out"]

Record = Mapping[str, Any]

# Okabe and Ito's colour-blind safe palette; grey and Tol's wine replace its yellow, which is hard
# to see on white. The cycles of colours, styles and markers have different lengths, so that no two
# methods share all three.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A7A7A",
    "#882255",
)  # fmt: skip
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

DARKER = {"#E69F00": "#9A6A00", "#56B4E9": "#1F78AE"}
"""Text colours for lines whose colour is too light for text."""

PANEL = (7.6, 3.9)
"""Size of one panel with its labels, in inches."""
LINE = 0.062
"""Height of a label, as a fraction of the panel height."""


def draw(record: Record, path: Path) -> None:
    """Plot the fraction of the dense mIoU and the relative error against the cost removed.

    Args:
        record: Record of a comparison, with its summary.
        path: PNG file to write.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    methods = list(record["methods"])
    tall = max(1.0, len(methods) * LINE * 1.1)
    figure = new_figure(PANEL[0], 2 * PANEL[1] * tall)
    from matplotlib.ticker import LogLocator, NullLocator

    kept, wrong = figure.subplots(2, 1, sharex=True)
    # The cost axis ends 5% past the largest ratio.
    kept.set_xlim(0, 100 * min(1.0, 1.05 * float(max(record["ratios"]))))
    kept.set_title(_title(record), loc="left", fontsize=10)
    _panel(kept, {m: _curve(record, m, "retention", 100.0, [(0.0, 100.0, 0.0)]) for m in methods})
    kept.set_ylim(bottom=0)
    kept.set_ylabel("mIoU kept (% of dense)")
    # A logarithmic axis separates the small errors of good methods.
    wrong.set_yscale("log")
    _panel(wrong, {m: _curve(record, m, "relative_error", 1.0, []) for m in methods})
    wrong.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    wrong.yaxis.set_minor_locator(NullLocator())
    wrong.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    wrong.set_ylabel("relative error of the features (log)")
    budget = record["budget"]
    wrong.set_xlabel(f"{budget_name(budget)} removed (% of {count(record['dense'][budget])})")
    for axes in (kept, wrong):
        _names(axes)
    save(figure, path)


Curve = list[tuple[float, float, float]]
"""Points (cost removed in percent, mean, standard deviation), ascending."""


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return heights near ``wanted``, at least ``gap`` apart, within [low, high] if they fit.

    >>> spread_out([0.5, 0.5, 0.9], 0.2, 0.0, 1.0)
    [0.4, 0.6, 0.9]

    Args:
        wanted: Preferred heights, in any order.
        gap: Minimum distance.
        low: Minimum height.
        high: Maximum height.
    """
    # Overlapping labels form one block around the mean of their preferred heights.
    blocks: list[list[int]] = []

    def centre(block: Sequence[int]) -> float:
        half = gap * (len(block) - 1) / 2
        mean = sum(wanted[i] for i in block) / len(block)
        return max(low + half, min(high - half, mean))

    for index in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        blocks.append([index])
        while len(blocks) > 1:
            below, above = blocks[-2], blocks[-1]
            reach = gap * (len(below) + len(above)) / 2
            if centre(above) - centre(below) >= reach - 1e-12:
                break
            blocks[-2:] = [below + above]
    heights = [0.0] * len(wanted)
    for block in blocks:
        bottom = centre(block) - gap * (len(block) - 1) / 2
        for step, index in enumerate(block):
            heights[index] = round(bottom + gap * step, 9)
    return heights


def _curve(record: Record, method: str, figure: str, scale: float, start: Curve) -> Curve:
    """Return ``start`` and a point per ratio that was reached; empty if none was."""
    budget = record["budget"]
    dense = record["dense"][budget]
    points = [
        (
            100 * (1 - entry[budget] / dense),
            scale * entry[figure]["mean"],
            scale * (entry[figure]["sd"] or 0.0),
        )
        for entry in record["summary"]
        if entry["method"] == method and entry[figure]["mean"] is not None
    ]
    return [*start, *sorted(points)] if points else []


def _panel(axes: Any, curves: Mapping[str, Curve]) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        if not curve:
            continue
        x, y, band = zip(*curve, strict=True)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            x, y, label=name, color=colour, linestyle=STYLES[index % len(STYLES)], linewidth=1.6,
            marker=MARKERS[index % len(MARKERS)], markersize=5,
        )  # fmt: skip
        # The band stays above 0, which a logarithmic axis cannot show.
        lower = [max(a - b, 0.2 * a) for a, b in zip(y, band, strict=True)]
        upper = [a + b for a, b in zip(y, band, strict=True)]
        axes.fill_between(x, lower, upper, color=colour, alpha=0.15, linewidth=0)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _names(axes: Any) -> None:
    """Label every curve at the right of the panel, with a line from its last point."""
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in axes.get_lines()]
    if not ends:
        return
    # Heights in fractions of the panel, from data coordinates through pixels.
    wanted = axes.transAxes.inverted().transform(axes.transData.transform(ends))[:, 1]
    furthest = max(x for x, _ in ends)
    heights = spread_out([float(value) for value in wanted], LINE, 0.0, 1.0)
    for line, end, height in zip(axes.get_lines(), ends, heights, strict=True):
        axes.annotate(
            line.get_label(),
            xy=end,
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=DARKER.get(line.get_color(), line.get_color()),
            arrowprops={
                # Dotted if the curve ends early, so that it does not look like part of the curve.
                "linestyle": "-" if end[0] > furthest - 2 else (0, (1, 4)),
                "arrowstyle": "-", "color": line.get_color(), "lw": 0.6, "alpha": 0.7,
                "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3,
            },
        )  # fmt: skip


def _title(record: Record) -> str:
    seeds = record["seeds"]
    data = "procedural scenes" if record["data"] == "scenes" else Path(record["data"]).name
    band = "band: ± one standard deviation over" if seeds > 1 else "no band:"
    title = f"{record['model']}: {record['images']} images ({data}); {band} {seeds} seed"
    title += "s" if seeds > 1 else ""
    return title if record["trained"] else f"{title}\nUNTRAINED WEIGHTS: figures are meaningless"
