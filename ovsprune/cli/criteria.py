"""``ovsprune criteria``."""

from __future__ import annotations

import click

from ovsprune.cli.screen import Screen, output_options


@click.command("criteria", short_help="List criteria, allocations and recoveries.")
@output_options
def command(screen: Screen) -> None:
    """List the criteria, allocations and recoveries for `ovsprune prune`."""
    from ovsprune.jobs.listing import criteria
    from ovsprune.report.tables import listing

    record = criteria()
    screen.finish(record, *listing(record))
