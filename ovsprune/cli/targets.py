"""``ovsprune targets``."""

from __future__ import annotations

import click

from ovsprune.cli.screen import Screen, output_options


@click.command("targets", short_help="The frameworks that --target takes.")
@output_options
def command(screen: Screen) -> None:
    """List the frameworks that --target takes."""
    from ovsprune.jobs.listing import targets
    from ovsprune.report.tables import listing

    record = targets()
    screen.finish(record, *listing(record))
