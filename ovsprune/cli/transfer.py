"""``ovsprune transfer``."""

from __future__ import annotations

from typing import Any

import click

from ovsprune.cli.options import PATH, SLIM, WEIGHTS, default_option, output
from ovsprune.cli.screen import Screen, output_options


@click.command("transfer", short_help="Put a slim tower into a framework.")
@click.option("--target", required=True, help="Framework from `ovsprune targets`.")
@SLIM
@click.option(
    "--checkpoint",
    type=PATH,
    metavar="FILE",
    help="Checkpoint of the framework to put the slim tower into.",
)
@WEIGHTS
@click.option(
    "--calibration",
    metavar="DIR",
    help="Images for the repair of the pruned weights of the framework (weights target): a folder, "
    "procedural, leaves or mixed.",
)
@click.option(
    "--samples",
    type=int,
    show_default="256; of leaves or mixed 1024",
    help="Number of calibration images.",
)
@default_option("--recovery", default="closed-form", help="Recovery, as for prune.")
@click.option(
    "--policy", metavar="NAME", help="Add a training schedule with this policy to the lines to add."
)
@default_option("--fraction", default=0.5, help="Fraction of layers that the policy trains.")
@output("Output directory.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--force", is_flag=True, help="Accept a checkpoint whose base model is untrained.")
@click.option("--dry-run", is_flag=True, help="Show the result without writing it.")
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Put a slim tower into a checkpoint of a segmentation framework.

    Report every key as replaced, kept or dropped, with the reason, and print the lines to add to
    the training script.
    """
    from ovsprune.jobs.transfer import transfer
    from ovsprune.report.tables import transfer_summary

    record = transfer(**options, progress=screen.progress)
    screen.finish(record, *transfer_summary(record))
