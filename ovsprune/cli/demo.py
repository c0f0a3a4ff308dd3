"""``ovsprune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ovsprune.cli.screen import Screen, output_options


@click.command("demo", short_help="The whole of it on the embedded model, in minutes.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Where the checkpoint, the picture and the record go.",
)
@click.option(
    "--ratio", type=float, default=0.5, show_default=True, help="Part of the MACs to remove."
)
@click.option(
    "--scenes", type=int, default=200, show_default=True, help="Test scenes for the mIoU."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all that is drawn.")
@click.option("--threads", type=int, help="CPU threads; by default PyTorch decides.")
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Show the whole of it on the embedded model, in under three minutes.

    Prunes `tiny` to half of its MACs, measures it against simpler ways to do that, saves the slim
    checkpoint and a picture, and puts the slim tower into a small SAN where mmsegmentation is
    installed.
    """
    from ovsprune.jobs.demo import demo
    from ovsprune.report.tables import demo_summary

    record = demo(**options, progress=screen.progress)
    screen.finish(record, *demo_summary(record))
