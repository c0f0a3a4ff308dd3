"""``ovsprune transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ovsprune.cli.screen import Screen, output_options


@click.command("transfer", short_help="Put a slim tower into a framework.")
@click.option("--target", required=True, help="A framework that `ovsprune targets` lists.")
@click.option(
    "--slim",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The slim checkpoint; by default the newest under slim/.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The framework's own checkpoint, to carry the slim tower.",
)
@click.option(
    "--weights",
    default="auto",
    show_default=True,
    help="slim (the framework uses the frozen base CLIP), target (it finetuned its CLIP), or auto.",
)
@click.option(
    "--calibration",
    metavar="DIR",
    help="Pictures to repair the framework's own weights on, once they are cut (weights target): a "
    "folder, procedural, leaves or mixed.",
)
@click.option(
    "--samples",
    type=int,
    show_default="256; of leaves or mixed 1024",
    help="Calibration pictures.",
)
@click.option("--recovery", default="closed-form", show_default=True, help="As of prune.")
@click.option(
    "--policy", metavar="NAME", help="Put a schedule into the lines to add, as of `schedule`."
)
@click.option(
    "--fraction", type=float, default=0.5, show_default=True, help="Share of layers that it trains."
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), metavar="DIR", help="Where the result goes."
)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--force", is_flag=True, help="Take a checkpoint whose base model is untrained, too.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Put a slim tower into a segmentation framework's checkpoint.

    Accounts for every key (replaced, kept, dropped, and why) and prints the lines to add to the
    framework's training script.
    """
    from ovsprune.jobs.transfer import transfer
    from ovsprune.report.tables import transfer_summary

    record = transfer(**options, progress=screen.progress)
    screen.finish(record, *transfer_summary(record))
