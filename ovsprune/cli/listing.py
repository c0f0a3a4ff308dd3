"""``ovsprune models``, ``ovsprune targets`` and ``ovsprune criteria``."""

from __future__ import annotations

import click

from ovsprune.cli.screen import Screen, output_options

__all__ = ["LISTS", "list_command"]

LISTS = {
    "models": ("List the models for --model.", "List the model names for --model."),
    "targets": ("List the frameworks for --target.", "List the frameworks for --target."),
    "criteria": (
        "List criteria, allocations and recoveries.",
        "List the criteria, allocations and recoveries for `ovsprune prune`.",
    ),
}
"""Name of a command to its summary and its help."""


def list_command(name: str) -> click.Command:
    """Return the command that prints a list; its job has the same name."""
    summary, text = LISTS[name]

    @click.command(name, short_help=summary, help=text)
    @output_options
    def command(screen: Screen) -> None:
        from ovsprune.jobs import listing as jobs
        from ovsprune.report.tables import listing

        record = getattr(jobs, name)()
        screen.finish(record, *listing(record))

    return command
