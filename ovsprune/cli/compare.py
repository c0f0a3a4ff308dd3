"""``ovsprune compare``."""

from __future__ import annotations

from typing import Any

import click

from ovsprune.cli.config_options import config_options
from ovsprune.cli.options import (
    ACTIVATION,
    MODEL,
    PATH,
    PRETRAINED,
    compute_options,
    default_option,
    output,
    scoring_options,
)
from ovsprune.cli.screen import Screen, output_options
from ovsprune.pruning.config import PruneConfig


@click.command("compare", short_help="Compare methods at the same budget.")
@MODEL
@click.option(
    "--ratio",
    "ratios",
    required=True,
    type=float,
    multiple=True,
    help="Fraction of the cost to remove, in (0, 1); may be repeated.",
)
# Torch-Pruning cannot use a table of layer times.
@config_options(PruneConfig, compare="all", without={"budget": ("latency",)})
@click.option(
    "--methods",
    multiple=True,
    metavar="A,B,C",
    help="default, imp, CRITERION or torch-pruning, with +ALLOCATION, +RECOVERY and :OPTION; "
    "may be repeated.",
)
@default_option("--seeds", default=3, help="Number of seeds, from 0 on.")
@click.option(
    "--data",
    metavar="DIR",
    help="Folder with images/, labels/ and classes.json; by default procedural test scenes.",
)
@scoring_options
@click.option(
    "--scenes",
    type=int,
    help="Number of test scenes (500 by default), or maximum number of images of --data.",
)
@PRETRAINED
@ACTIVATION
@output("Output directory for rows, tables and plot; by default compare/MODEL.")
@click.option("--overwrite", is_flag=True, help="Start again instead of resuming.")
@click.option(
    "--earlier",
    multiple=True,
    type=PATH,
    metavar="FILE",
    help="compare.json of the same comparison whose rows to import; may be repeated.",
)
@compute_options(dtype=False)
@output_options
def command(screen: Screen, methods: tuple[str, ...], **options: Any) -> None:
    """Prune with several methods at the same budget and images, and evaluate each.

    A method is `default`, a criterion (alone: uniform, without recovery) with `+ALLOCATION` and
    `+RECOVERY`, such as `magnitude+sensitivity+closed-form`, or a baseline: `torch-pruning`,
    `torch-pruning-uniform`, `torch-pruning-taylor`, `torch-pruning-isomorphic`, alone or with
    `+RECOVERY`. Options of `prune` may follow, each after a colon: `default:rounds=3`,
    `default+distill:distill-steps=500`, `default:prune-depth`. Finished rows are saved: the same
    command resumes an interrupted comparison.
    """
    from ovsprune.jobs.compare import METHODS, compare
    from ovsprune.report.comparison import compare_summary

    # METHODS is not the option's default, because its module imports torch.
    record = compare(methods=methods or METHODS, **options, progress=screen.progress)
    screen.finish(record, *compare_summary(record))
