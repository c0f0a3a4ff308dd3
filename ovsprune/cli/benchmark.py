"""``ovsprune benchmark``."""

from __future__ import annotations

from typing import Any

import click

from ovsprune.cli.screen import Screen, compute_options, output_options


@click.command("benchmark", short_help="Measure latency, throughput and memory.")
@click.option("--model", required=True, help="Model name or slim directory.")
@click.option(
    "--against",
    metavar="NAME",
    help="Reference model; by default the dense base of a slim directory.",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=int,
    multiple=True,
    default=(1, 8),
    show_default=True,
    help="Batch size; may be repeated.",
)
@click.option(
    "--pairs", type=int, default=20, show_default=True, help="Alternating pairs of passes."
)
@compute_options(batch_size=None)
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Measure latency, throughput and peak memory, slim against dense in one run."""
    from ovsprune.jobs.benchmark import benchmark
    from ovsprune.report.tables import benchmark_summary

    record = benchmark(**options, progress=screen.progress)
    screen.finish(record, *benchmark_summary(record))
