"""Options shared by several commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = ["schedule_options", "scoring_options"]

Callback = Callable[..., Any]


def schedule_options(function: Callback) -> Callback:
    """Add the options of a policy: ``--fraction, --count, --every, --pool, --rest, --seed``."""
    return _adding(
        click.option(
            "--fraction",
            default=0.5,
            show_default=True,
            help="Fraction of the layers that train, 0 to 1.",
        ),
        click.option(
            "--count", type=int, help="Number of layers that train, instead of a fraction."
        ),
        click.option(
            "--every",
            type=int,
            help="Steps between two choices of a policy; by default a tenth of all steps.",
        ),
        click.option(
            "--pool",
            multiple=True,
            metavar="PATTERN",
            help="Only parameters with matching names (repeatable); by default the image tower.",
        ),
        click.option(
            "--rest",
            default="follow",
            show_default=True,
            help="Norms, biases and positions: follow (their layer), train, freeze or keep.",
        ),
        click.option("--seed", default=0, show_default=True, help="Seed of random policies."),
    )(function)


def scoring_options(function: Callback) -> Callback:
    """Add the options of an evaluation: ``--list``, ``--text-embeddings`` and ``--centred``."""
    return _adding(
        click.option(
            "--list",
            "list_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="File with the names of the images of --data to use, one stem per line.",
        ),
        click.option(
            "--text-embeddings",
            type=click.Path(path_type=Path),
            metavar="FILE.npz",
            help="Class embeddings, for a model without a text tower.",
        ),
        click.option(
            "--centred",
            is_flag=True,
            help="Subtract the mean of the class embeddings before scoring.",
        ),
    )(function)


def _adding(*options: Callable[[Callback], Callback]) -> Callable[[Callback], Callback]:
    def decorate(function: Callback) -> Callback:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
