"""``ovsprune launch``."""

from __future__ import annotations

from typing import Any

import click

from ovsprune.cli.options import SLIM, WEIGHTS, default_option, schedule_options
from ovsprune.cli.screen import Screen, output_options
from ovsprune.cli.silence import users_environment


@click.command("launch", short_help="Run a framework's script with slim towers.")
@SLIM
@default_option(
    "--target", default="auto", help="Framework from `ovsprune targets`; auto detects it."
)
@WEIGHTS
@click.option(
    "--policy",
    help="Policy from `ovsprune schedule --list` that selects the layers to train; by default the "
    "framework decides.",
)
@schedule_options
@click.option("--force", is_flag=True, help="Accept a checkpoint whose base model is untrained.")
# Unprocessed: options after -- belong to the framework's script.
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@output_options
def command(screen: Screen, **options: Any) -> int:
    """Run a framework's COMMAND and replace the image towers that it builds by slim ones.

    Write the command after --: ovsprune launch --slim DIR -- python train_net.py ... The
    framework's code is not modified. Dense checkpoints are pruned while they are loaded. The exit
    status is that of the command, or 2 if nothing was replaced.
    """
    from ovsprune.launching.command import launch
    from ovsprune.report.tables import launch_summary

    record = launch(**options, environment=users_environment(), progress=screen.progress)
    screen.finish(record, *launch_summary(record))
    # main() exits with this status.
    return int(record["returncode"])
