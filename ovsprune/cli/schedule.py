"""``ovsprune schedule``."""

from __future__ import annotations

from typing import Any

import click

from ovsprune.cli.options import default_option, schedule_options
from ovsprune.cli.screen import Screen, output_options


@click.command("schedule", short_help="Plan which layers train, and count the cost.")
# Not required, because --list needs no model.
@click.option("--model", help="Model name or slim directory.")
@click.option("--pretrained", help="Tag or file of the weights; 'none' for random ones.")
@default_option("--policy", default="alpha", help="Policy from --list.")
@schedule_options
@click.option("--total-steps", type=int, help="Optimiser steps of the training.")
@default_option("--fit", default="peak", help="Fit of the alphas: peak, least-ks or hill.")
@default_option(
    "--convolution",
    default="slices",
    help="Spectra of convolutions: slices (per kernel position) or unfolded.",
)
@default_option("--batch-size", default=1, help="Images per step.")
@click.option(
    "--measure",
    is_flag=True,
    help="Also measure time and peak memory of a step, against training all layers.",
)
@click.option("--list", "listed", is_flag=True, help="List the policies and exit.")
@output_options
def command(screen: Screen, listed: bool, **options: Any) -> None:
    """Plan which layers of an image tower train when, and count the FLOPs of a training step.

    To plan for a framework's model, call ovsprune.schedule(model, ...) in the training script, or
    use ovsprune launch --policy NAME.
    """
    from ovsprune.jobs.schedule import list_policies, plan_tower
    from ovsprune.report.schedules import schedule_summary
    from ovsprune.report.tables import listing

    if listed:
        record = list_policies()
        screen.finish(record, *listing(record))
        return
    record = plan_tower(**options, progress=screen.progress)
    screen.finish(record, *schedule_summary(record))
