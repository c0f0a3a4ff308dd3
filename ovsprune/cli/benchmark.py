"""``ovsprune benchmark``."""

from __future__ import annotations

from typing import Any

import click

from ovsprune.cli.options import MODEL, batch_sizes, compute_options, default_option
from ovsprune.cli.screen import Screen, output_options


@click.command("benchmark", short_help="Measure latency, throughput and memory.")
@MODEL
@click.option(
    "--against",
    metavar="NAME",
    help="Reference model; by default the dense base of a slim directory.",
)
@batch_sizes((1, 8), "Batch size; may be repeated.")
@default_option("--pairs", default=20, help="Alternating pairs of passes.")
@compute_options()
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Measure latency, throughput and peak memory, slim against dense in one run."""
    # Jobs import torch, which the help page does not need; so in every command.
    from ovsprune.jobs.benchmark import benchmark
    from ovsprune.report.tables import benchmark_summary

    record = benchmark(**options, progress=screen.progress)
    screen.finish(record, *benchmark_summary(record))
