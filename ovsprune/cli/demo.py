"""``ovsprune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ovsprune.cli.screen import Screen, output_options


@click.command("demo", short_help="Run all steps on the embedded model, in minutes.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Output directory for checkpoint, image and record.",
)
@click.option(
    "--ratio", type=float, default=0.5, show_default=True, help="Fraction of the MACs to remove."
)
@click.option(
    "--scenes", type=int, default=200, show_default=True, help="Number of test scenes for the mIoU."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all random draws.")
@click.option("--threads", type=int, help="CPU threads; by default PyTorch's choice.")
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Run all steps on the embedded model, in under three minutes.

    Prune `tiny` to half of its MACs, compare with simpler methods, save the slim checkpoint and an
    image of segmentations, and transfer the slim tower into a small SAN if mmsegmentation is
    installed.
    """
    from ovsprune.jobs.demo import demo
    from ovsprune.report.tables import demo_summary

    record = demo(**options, progress=screen.progress)
    screen.finish(record, *demo_summary(record))
