"""Spectra to look at: a table, and a picture of the tails and of alpha by depth."""

from __future__ import annotations

import math
import re
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ovsprune.report.curves import COLOURS, MARKERS
from ovsprune.report.figures import new_figure, save
from ovsprune.report.numbers import duration
from ovsprune.report.tables import table

__all__ = ["draw", "spectrum_summary"]

Record = Mapping[str, Any]
SHOWN = 9
"""Layers whose spectra are drawn: evenly from the smallest alpha to the largest."""
BINS = 40
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?:\.(?:\w+\.)?\d+)?(?=\.)")
"""Up to the number of a block, and of its stage before it where there are stages."""


def spectrum_summary(record: Record) -> Sequence[RenderableType]:
    """Every layer's fit, and the medians."""
    rows = [
        [
            str(layer["name"]),
            str(layer["kind"]),
            _number(layer["alpha"], 2),
            _number(layer["ks_distance"], 3),
            _number(layer["xmin"], 3),
            f"{layer['n_tail']} of {layer['n_eigenvalues']}",
            _number(layer["alpha_hat"], 2),
            _number(layer["stable_rank"], 1),
            _number(layer["spectral_norm"], 2),
        ]
        for layer in record["layers"]
    ]
    columns = [
        "layer", "<kind", "alpha", "KS", "xmin", "tail", "alpha-hat", "stable rank", "norm",
    ]  # fmt: skip
    kinds = ", ".join(f"{kind} {_number(alpha, 2)}" for kind, alpha in record["kinds"].items())
    lines = [f"Median alpha {_number(record['median_alpha'], 2)} ({kinds})."]
    if not record["trained"]:
        lines.append("note: the weights are random; their spectra say nothing about training")
    if record["plot"]:
        lines.append(f"Picture: {record['plot']}")
    lines.append(f"Took {duration(record['seconds'])}.")
    title = f"Spectra of {record['model']}, fit {record['fit']}"
    return [table(title, columns, rows), Text("\n".join(lines))]


def _number(value: float | None, digits: int) -> str:
    if value is None or not math.isfinite(value):
        return "none"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def draw(measured: Sequence[Any], path: Path, title: str = "") -> None:
    """Draw log-log densities with their fitted tails, and below them alpha by depth and kind.

    Args:
        measured: :class:`ovsprune.spectrum.Spectrum` of each layer, in the order of the model.
        path: The PNG to write.
        title: Above it.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    shown = _shown(measured)
    rows = max(1, -(-len(shown) // 3))
    figure = new_figure(10.5, 2.3 * rows + 4.2, dpi=140)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.3 * rows, 4.0])
    above, below = parts
    figure.suptitle(title, fontsize=11)
    panels = above.subplots(rows, 3, squeeze=False).flatten()
    for axes, one in zip(panels, shown, strict=False):
        _density(axes, one)
    for axes in panels[len(shown) :]:
        axes.axis("off")
    above.supxlabel("eigenvalue", fontsize=9)
    above.supylabel("density", fontsize=9)
    _by_depth(below.subplots(), measured)
    save(figure, path)


def _shown(measured: Sequence[Any]) -> list[Any]:
    """Some of them, evenly spread by alpha, with at least a few eigenvalues."""
    able = sorted(
        (one for one in measured if math.isfinite(one.alpha) and one.n_eigenvalues > 9),
        key=lambda one: one.alpha,
    )
    if len(able) <= SHOWN:
        return able
    return [able[round(i * (len(able) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def _density(axes: Any, one: Any) -> None:
    """The empirical density in log-spaced bins, with the power law from xmin on."""
    values = one.eigenvalues.numpy()
    low, high = math.log10(values[0]), math.log10(values[-1])
    low = max(low, high - 8)  # the rest is rounding, and takes the picture's width
    edges = [10 ** (low + (high - low) * i / BINS) for i in range(BINS + 1)]
    edges[-1] = values[-1] * (1 + 1e-9)
    counts = _counts(values, edges)
    bins = list(pairwise(edges))
    density = [n / (len(values) * (b - a)) for n, (a, b) in zip(counts, bins, strict=True)]
    middles = [math.sqrt(a * b) for a, b in bins]
    points = [(x, y) for x, y in zip(middles, density, strict=True) if y > 0]
    axes.loglog(*zip(*points, strict=True), ".", ms=4, color="#7A7A7A")
    share = one.n_tail / len(values)
    xs = [one.xmin * (values[-1] / one.xmin) ** (i / 30) for i in range(31)]
    scale = share * (one.alpha - 1) / one.xmin
    axes.loglog(xs, [scale * (x / one.xmin) ** -one.alpha for x in xs], color="#D55E00", lw=1.6)
    axes.axvline(one.xmin, color="#0072B2", lw=0.8, ls=":")
    lowest, most = min(y for _, y in points), max(y for _, y in points)
    axes.set_ylim(lowest / 3, 3 * most)
    _few_ticks(axes.xaxis, 10**low, 10**high)
    _few_ticks(axes.yaxis, lowest / 3, 3 * most)
    axes.set_title(one.name, fontsize=7.5)
    axes.text(
        0.04, 0.06, f"$\\alpha$ = {one.alpha:.2f}\nKS {one.ks_distance:.3f}",
        transform=axes.transAxes, fontsize=8, va="bottom",
    )  # fmt: skip
    axes.tick_params(labelsize=7)


def _counts(values: Any, edges: Sequence[float]) -> list[int]:
    return [b - a for a, b in pairwise(bisect_left(values, edge) for edge in edges)]


def _by_depth(axes: Any, measured: Sequence[Any]) -> None:
    """Alpha by block: a line for each kind of layer that comes again, crosses for the others."""
    kinds = list(dict.fromkeys(one.kind for one in measured))
    many = [k for k in kinds if sum(one.kind == k for one in measured) > 1]
    depths = _depths(measured)
    for i, kind in enumerate(many):
        points = [
            (depth, one.alpha)
            for depth, one in zip(depths, measured, strict=True)
            if one.kind == kind and math.isfinite(one.alpha)
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker=MARKERS[i % len(MARKERS)], ms=5, lw=1.0,
                color=COLOURS[i % len(COLOURS)], label=kind,
            )  # fmt: skip
    single = [
        (depth, one.alpha)
        for depth, one in zip(depths, measured, strict=True)
        if one.kind not in many and math.isfinite(one.alpha)
    ]
    if single:
        axes.plot(*zip(*single, strict=True), "x", color="#7A7A7A", ms=5, label="others")
    finite = [one.alpha for one in measured if math.isfinite(one.alpha)]
    if finite:
        middle = statistics.median(finite)
        axes.axhline(middle, color="#000000", lw=0.8, ls="--", label=f"median {middle:.2f}")
        if max(finite) > 4 * middle:
            axes.set_yscale("log")
            _few_ticks(axes.yaxis, min(finite), max(finite), plain=math.inf)
    axes.set_xlabel("depth (block)", fontsize=9)
    axes.set_ylabel("$\\alpha$", fontsize=9)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _depths(measured: Sequence[Any]) -> list[float]:
    """The number of each layer's block, counted on over stages; what stands before the first block
    is at -1, and what comes after the last one past it.
    """
    blocks: dict[str, float] = {}
    found: list[float | None] = []
    for one in measured:
        place = _BLOCK.match(one.name)
        found.append(None if place is None else blocks.setdefault(place[0], float(len(blocks))))
    if not blocks:
        return [float(i) for i in range(len(measured))]
    last = max(i for i, depth in enumerate(found) if depth is not None)
    after = float(len(blocks))
    return [(-1.0 if i < last else after) if d is None else d for i, d in enumerate(found)]


def _few_ticks(axis: Any, low: float, high: float, plain: float = 30.0) -> None:
    """Few numbers on a logarithmic axis; as people write them below a span of ``plain``."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

    if high / low > plain:
        axis.set_minor_formatter(NullFormatter())
        return
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low > 2.5 else "all"))
    axis.set_major_formatter(FormatStrFormatter("%.2g"))
