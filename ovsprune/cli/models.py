"""``ovsprune models``."""

from __future__ import annotations

import click

from ovsprune.cli.screen import Screen, output_options


@click.command("models", short_help="List the models for --model.")
@output_options
def command(screen: Screen) -> None:
    """List the model names for --model."""
    from ovsprune.jobs.listing import models
    from ovsprune.report.tables import listing

    record = models()
    screen.finish(record, *listing(record))
