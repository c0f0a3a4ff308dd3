"""``ovsprune compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ovsprune.cli.config_options import config_options
from ovsprune.cli.options import scoring_options
from ovsprune.cli.screen import Screen, compute_options, output_options
from ovsprune.pruning.config import PruneConfig


@click.command("compare", short_help="Methods side by side under one budget.")
@click.option("--model", required=True, help="A model name or a slim directory.")
@click.option(
    "--ratio",
    "ratios",
    required=True,
    type=float,
    multiple=True,
    help="Part of the cost to remove, in (0, 1); may be repeated.",
)
@config_options(PruneConfig, compare="all", without={"budget": ("latency",)})
@click.option(
    "--methods",
    multiple=True,
    metavar="A,B,C",
    help="default, imp, CRITERION or torch-pruning, with +ALLOCATION, +RECOVERY and :OPTION; "
    "repeatable.",
)
@click.option("--seeds", type=int, default=3, show_default=True, help="How many seeds, from 0 on.")
@click.option(
    "--data",
    metavar="DIR",
    help="A folder with images/, labels/ and classes.json; by default procedural test scenes.",
)
@scoring_options
@click.option(
    "--scenes",
    type=int,
    help="Test scenes to score on (500 by default), or the most pictures of --data.",
)
@click.option("--pretrained", help="Weights: a tag of open_clip, a file, or 'none'.")
@click.option("--activation", help="gelu or quick_gelu, for a weights file that does not say.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where rows, tables and plot go; by default compare/MODEL.",
)
@click.option("--overwrite", is_flag=True, help="Start anew instead of going on.")
@click.option(
    "--earlier",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="compare.json of the same comparison, whose rows are taken over; may be repeated.",
)
@compute_options(batch_size=None, dtype=False)
@output_options
def command(screen: Screen, methods: tuple[str, ...], **options: Any) -> None:
    """Prune by several methods at the same budget, with the same pictures, and score each.

    A method is `default`, a criterion (alone: uniform, without recovery) with `+ALLOCATION` and
    `+RECOVERY`, such as `magnitude+sensitivity+closed-form`, or a stock method: `torch-pruning`,
    `torch-pruning-uniform`, `torch-pruning-taylor`, `torch-pruning-isomorphic`, alone or with
    `+RECOVERY`. Options of `prune` may follow, each after a colon: `default:rounds=3`,
    `default+distill:distill-steps=500`, `default:prune-depth`. Rows are kept as they are done:
    the same command goes on where it stopped.
    """
    from ovsprune.jobs.compare import METHODS, compare
    from ovsprune.report.comparison import compare_summary

    record = compare(methods=methods or METHODS, **options, progress=screen.progress)
    screen.finish(record, *compare_summary(record))
