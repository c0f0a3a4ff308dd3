"""Table of spectra, and plot of their tails and of alpha by depth."""

from __future__ import annotations

import math
import re
import statistics
from bisect import bisect_left
from collections import Counter
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
"""Number of layers whose spectra are drawn, evenly spread over alpha."""
BINS = 40
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?:\.(?:\w+\.)?\d+)?(?=\.)")
"""Prefix of a layer's name up to the number of its block (and stage)."""


def spectrum_summary(record: Record) -> Sequence[RenderableType]:
    """Return a table with the fit of every layer, and the medians."""
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
        lines.append("note: the weights are random; their spectra do not reflect training")
    if record["plot"]:
        lines.append(f"Plot: {record['plot']}")
    lines.append(f"Took {duration(record['seconds'])}.")
    title = f"Spectra of {record['model']}, fit {record['fit']}"
    return [table(title, columns, rows), Text("\n".join(lines))]


def _number(value: float | None, digits: int) -> str:
    if value is None or not math.isfinite(value):
        return "none"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def draw(measured: Sequence[Any], path: Path, title: str = "") -> None:
    """Plot log-log densities with their fitted tails, and alpha by depth and kind.

    Args:
        measured: :class:`ovsprune.spectrum.Spectrum` of each layer, in the order of the model.
        path: PNG file to write.
        title: Title of the figure.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    shown = _shown(measured)
    rows = max(1, -(-len(shown) // 3))
    figure = new_figure(10.5, 2.3 * rows + 4.2, dpi=140)
    above, below = figure.subfigures(2, 1, height_ratios=[2.3 * rows, 4.0])
    figure.suptitle(title, fontsize=11)
    panels = above.subplots(rows, 3, squeeze=False).flatten()
    for axes, spectrum in zip(panels, shown, strict=False):
        _density(axes, spectrum)
    for axes in panels[len(shown) :]:
        axes.axis("off")
    above.supxlabel("eigenvalue", fontsize=9)
    above.supylabel("density", fontsize=9)
    _by_depth(below.subplots(), measured)
    save(figure, path)


def _shown(measured: Sequence[Any]) -> list[Any]:
    """Select spectra with at least 10 eigenvalues, evenly spread by alpha."""
    usable = sorted(
        (s for s in measured if math.isfinite(s.alpha) and s.n_eigenvalues > 9),
        key=lambda s: s.alpha,
    )
    if len(usable) <= SHOWN:
        return usable
    return [usable[round(i * (len(usable) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def _density(axes: Any, spectrum: Any) -> None:
    """Plot the empirical density in log-spaced bins, and the fitted power law above xmin."""
    values = spectrum.eigenvalues.numpy()
    low, high = math.log10(values[0]), math.log10(values[-1])
    low = max(low, high - 8)  # eigenvalues below are rounding errors
    edges = [10 ** (low + (high - low) * i / BINS) for i in range(BINS + 1)]
    # bisect_left leaves out values that equal the last edge.
    edges[-1] = values[-1] * (1 + 1e-9)
    counts = [b - a for a, b in pairwise(bisect_left(values, edge) for edge in edges)]
    bins = list(pairwise(edges))
    density = [n / (len(values) * (b - a)) for n, (a, b) in zip(counts, bins, strict=True)]
    middles = [math.sqrt(a * b) for a, b in bins]  # geometric: the centre on a log axis
    points = [(x, y) for x, y in zip(middles, density, strict=True) if y > 0]  # a log axis has no 0
    axes.loglog(*zip(*points, strict=True), ".", ms=4, color="#7A7A7A")
    alpha, xmin = spectrum.alpha, spectrum.xmin
    xs = [xmin * (values[-1] / xmin) ** (i / 30) for i in range(31)]
    # density of the tail: p(x) = (alpha - 1) / xmin (x / xmin)^-alpha, times its share of values
    scale = spectrum.n_tail / len(values) * (alpha - 1) / xmin
    axes.loglog(xs, [scale * (x / xmin) ** -alpha for x in xs], color="#D55E00", lw=1.6)
    axes.axvline(xmin, color="#0072B2", lw=0.8, ls=":")
    lowest, most = min(y for _, y in points), max(y for _, y in points)
    axes.set_ylim(lowest / 3, 3 * most)
    _few_ticks(axes.xaxis, 10**low, 10**high)
    _few_ticks(axes.yaxis, lowest / 3, 3 * most)
    axes.set_title(spectrum.name, fontsize=7.5)
    axes.text(
        0.04, 0.06, f"$\\alpha$ = {alpha:.2f}\nKS {spectrum.ks_distance:.3f}",
        transform=axes.transAxes, fontsize=8, va="bottom",
    )  # fmt: skip
    axes.tick_params(labelsize=7)


def _by_depth(axes: Any, measured: Sequence[Any]) -> None:
    """Plot alpha by block: a line per kind of layer that repeats, crosses for the others."""
    counts = Counter(spectrum.kind for spectrum in measured)
    points: dict[str, list[tuple[float, float]]] = {k: [] for k, n in counts.items() if n > 1}
    others: list[tuple[float, float]] = []
    for depth, spectrum in zip(_depths(measured), measured, strict=True):
        if math.isfinite(spectrum.alpha):
            points.get(spectrum.kind, others).append((depth, spectrum.alpha))
    for i, (kind, line) in enumerate(points.items()):
        if line:
            axes.plot(
                *zip(*line, strict=True), marker=MARKERS[i % len(MARKERS)], ms=5, lw=1.0,
                color=COLOURS[i % len(COLOURS)], label=kind,
            )  # fmt: skip
    if others:
        axes.plot(*zip(*others, strict=True), "x", color="#7A7A7A", ms=5, label="others")
    finite = [spectrum.alpha for spectrum in measured if math.isfinite(spectrum.alpha)]
    if finite:
        middle = statistics.median(finite)
        axes.axhline(middle, color="#000000", lw=0.8, ls="--", label=f"median {middle:.2f}")
        # A logarithmic axis keeps the other layers apart if one alpha is far above the median.
        if max(finite) > 4 * middle:
            axes.set_yscale("log")
            _few_ticks(axes.yaxis, min(finite), max(finite), plain=math.inf)
    axes.set_xlabel("depth (block)", fontsize=9)
    axes.set_ylabel("$\\alpha$", fontsize=9)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _depths(measured: Sequence[Any]) -> list[float]:
    """Return the block number of each layer, counted over all stages.

    Layers before the first block get -1, layers after the last block the number of blocks.
    """
    blocks: dict[str, float] = {}
    depths: list[float | None] = []
    for spectrum in measured:
        block = _BLOCK.match(spectrum.name)
        depths.append(None if block is None else blocks.setdefault(block[0], float(len(blocks))))
    if not blocks:
        return [float(i) for i in range(len(measured))]
    last = max(i for i, depth in enumerate(depths) if depth is not None)
    after = float(len(blocks))
    return [(-1.0 if i < last else after) if d is None else d for i, d in enumerate(depths)]


def _few_ticks(axis: Any, low: float, high: float, plain: float = 30.0) -> None:
    """Limit the tick labels of a log axis; plain numbers if high / low is at most ``plain``."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

    if high / low > plain:
        axis.set_minor_formatter(NullFormatter())
        return
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low > 2.5 else "all"))
    axis.set_major_formatter(FormatStrFormatter("%.2g"))
