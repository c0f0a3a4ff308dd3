"""``ovsprune launch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ovsprune.cli.options import schedule_options
from ovsprune.cli.screen import Screen, output_options
from ovsprune.cli.silence import users_environment


@click.command("launch", short_help="Run a framework's script with slim towers.")
@click.option(
    "--slim",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The slim checkpoint; by default the newest under slim/.",
)
@click.option(
    "--target",
    default="auto",
    show_default=True,
    help="A framework that `ovsprune targets` lists; auto asks each of them.",
)
@click.option(
    "--weights",
    default="auto",
    show_default=True,
    help="slim (the framework uses the frozen base CLIP), target (it finetuned its CLIP), or auto.",
)
@click.option(
    "--policy",
    help="Which layers train, hooked into the framework's loop: a policy that `ovsprune schedule "
    "--list` shows; by default as the framework has it.",
)
@schedule_options
@click.option("--force", is_flag=True, help="Take a checkpoint whose base model is untrained, too.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@output_options
def command(screen: Screen, **options: Any) -> int:
    """Run a framework's own COMMAND with the towers that it builds replaced as they are built.

    Write it after --, as it would be typed: ovsprune launch --slim DIR -- python train_net.py ...
    Nothing of the framework's code is touched. A dense checkpoint that the framework loads is cut
    as it is loaded. The exit status is the command's; 2 if nothing was replaced.
    """
    from ovsprune.launching.command import launch
    from ovsprune.report.tables import launch_summary

    record = launch(**options, environment=users_environment(), progress=screen.progress)
    screen.finish(record, *launch_summary(record))
    return int(record["returncode"])
