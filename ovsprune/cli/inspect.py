"""``ovsprune inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from ovsprune.cli.options import PATH
from ovsprune.cli.screen import Screen, output_options


@click.command("inspect", short_help="Show the contents of a slim checkpoint.")
@click.argument("directory", type=PATH, metavar="DIR")
@click.option(
    "--recipe",
    metavar="FILE",
    help="Write the options that made the checkpoint to a TOML file, for `ovsprune prune "
    "--config FILE`.",
)
@output_options
def command(screen: Screen, directory: Path, recipe: str | None) -> None:
    """Show the contents of a slim checkpoint, layer by layer."""
    from ovsprune.jobs.inspect import inspect
    from ovsprune.report.tables import inspect_summary

    record = inspect(directory, recipe=recipe)
    screen.finish(record, *inspect_summary(record))
