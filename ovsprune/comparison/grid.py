"""Grid of a comparison: every method at every ratio and seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ovsprune.comparison.identity import made_by, row_key
from ovsprune.comparison.methods import DEFAULT, Method, parse_methods
from ovsprune.comparison.results import Row, Rows
from ovsprune.comparison.runner import ComparisonRunner
from ovsprune.comparison.scoring import Scorer
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress
from ovsprune.graph.costs import count_costs
from ovsprune.report.comparison import makers

__all__ = ["Grid", "dense_scores", "fill", "reference_method"]


@dataclass(frozen=True)
class Grid:
    """Rows to make.

    Attributes:
        ratios: Fractions of the cost to remove.
        methods: Methods to compare.
        seeds: Number of seeds: 0 to ``seeds - 1``.
    """

    ratios: tuple[float, ...]
    methods: tuple[Method, ...]
    seeds: int

    @classmethod
    def parse(cls, ratios: Iterable[float], methods: Iterable[str], seeds: int) -> Grid:
        """Return the grid of these ratios and names of methods, without repetitions.

        Raises:
            OptionError: There is no ratio, method or seed.
            UnknownNameError: A part of a method is unknown.
        """
        parsed = parse_methods(methods)
        unique = tuple(dict.fromkeys(float(ratio) for ratio in ratios))
        if not unique:
            raise OptionError("--ratio is missing: give at least one, such as --ratio 0.5")
        if seeds < 1:
            raise OptionError(f"--seeds {seeds} is out of range; give 1 or more")
        return cls(unique, parsed, seeds)

    def __iter__(self) -> Iterator[tuple[int, float, Method]]:
        """Iterate over (seed, ratio, method) in the order in which rows are made."""
        return itertools.product(range(self.seeds), self.ratios, self.methods)

    def in_order(self, rows: Sequence[Row]) -> list[Row]:
        """Sort rows, given in the order of iteration, by ratio, method and seed."""
        # Rows are made seed by seed, so that a stopped run has all methods.
        by_key = dict(zip(self, rows, strict=True))
        keys = itertools.product(self.ratios, self.methods, range(self.seeds))
        return [by_key[seed, ratio, method] for ratio, method, seed in keys]


def dense_scores(scorer: Scorer, rows: Rows) -> dict[str, Any]:
    """Return costs and scores of the dense tower, from the stored rows if they are there."""
    stored = rows.find({"method": "dense"})
    if stored is None:
        backbone = scorer.backbone
        costs = count_costs(backbone.tower, backbone.preprocess.size)
        stored = {"method": "dense", "macs": costs.macs, "params": costs.params, **scorer.dense()}
        rows.add(stored)
    return {name: stored[name] for name in ("macs", "params", "miou", "pixel_accuracy")}


def fill(
    grid: Grid, rows: Rows, runner: ComparisonRunner, dense_miou: float, progress: Progress
) -> list[Row]:
    """Return every row of the grid, by ratio, method and seed; make those that are not stored.

    Each row is on disk before the next begins.

    Args:
        grid: Rows to make.
        rows: Stored rows.
        runner: Makes a row.
        dense_miou: mIoU of the dense tower, in [0, 1].
        progress: Progress reporter.
    """
    keys = list(grid)
    stored = [rows.find(row_key(*key)) for key in keys]
    missing = stored.count(None)
    if 0 < missing < len(keys):
        progress.note(f"{len(keys) - missing} of {len(keys)} rows are in {rows.place} already")
    others = makers(row for row in stored if row is not None)
    # Rows of the current versions need no note.
    others.pop(made_by(), None)
    for name, count in others.items():
        progress.note(f"made by {name}: {count} of these rows; --overwrite makes all anew")
    complete: list[Row] = []
    with progress.stage("comparing", missing) as advance:
        for (seed, ratio, method), row in zip(keys, stored, strict=True):
            if row is None:
                made = runner.row(method, ratio, seed)
                miou = made["miou"]
                # Untrained weights may give a dense mIoU of 0.
                retention = None if miou is None or not dense_miou else miou / dense_miou
                key = row_key(seed, ratio, method)
                row = {**key, **made, "retention": retention, "made_by": made_by()}
                rows.add(row)
                advance(1)
            complete.append(row)
    return grid.in_order(complete)


def reference_method(record: dict[str, Any]) -> str:
    """Return the method that the others are compared with.

    It is the default, or else the first method that reached a ratio.
    """
    reached = {row["method"] for row in record["rows"] if row["status"] == "done"}
    names = [name for name in record["methods"] if name in reached] or record["methods"]
    return DEFAULT if DEFAULT in names else str(names[0])
