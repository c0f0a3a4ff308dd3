"""``ovsprune models``."""

from __future__ import annotations

import click

from ovsprune.cli.screen import Screen, output_options


@click.command("models", short_help="The models that --model takes.")
@output_options
def command(screen: Screen) -> None:
    """List the models that --model takes."""
    from ovsprune.jobs.listing import models
    from ovsprune.report.tables import listing

    record = models()
    screen.finish(record, *listing(record))
