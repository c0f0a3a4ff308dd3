"""``ovsprune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ovsprune.cli.options import THREADS, default_option, output
from ovsprune.cli.screen import Screen, output_options


@click.command("demo", short_help="Run all steps on the embedded model, in minutes.")
@output(
    "Output directory for checkpoint, image and record.", default=Path("demo"), show_default=True
)
@default_option("--ratio", default=0.5, help="Fraction of the MACs to remove.")
@default_option("--scenes", default=200, help="Number of test scenes for the mIoU.")
@default_option("--seed", default=0, help="Seed of all random draws.")
@THREADS
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
