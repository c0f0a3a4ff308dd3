"""``ovsprune targets``."""

from __future__ import annotations

import click

from ovsprune.cli.screen import Screen, output_options


@click.command("targets", short_help="List the frameworks for --target.")
@output_options
def command(screen: Screen) -> None:
    """List the frameworks for --target."""
    from ovsprune.jobs.listing import targets
    from ovsprune.report.tables import listing

    record = targets()
    screen.finish(record, *listing(record))
