"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = ["schedule_options", "scoring_options"]

Callback = Callable[..., Any]


def schedule_options(function: Callback) -> Callback:
    """Add what a policy goes by: ``--fraction, --count, --every, --pool, --rest, --seed``."""
    return _adding(
        click.option(
            "--fraction",
            default=0.5,
            show_default=True,
            help="Share of the layers that train, 0 to 1.",
        ),
        click.option("--count", type=int, help="How many layers train, instead of a share."),
        click.option(
            "--every",
            type=int,
            help="How often a policy may change its mind, in steps; a tenth of all by default.",
        ),
        click.option(
            "--pool",
            multiple=True,
            metavar="PATTERN",
            help="Only parameters of such names (may be repeated); by default the image tower.",
        ),
        click.option(
            "--rest",
            default="follow",
            show_default=True,
            help="Norms, biases, positions: follow (their layer), train, freeze or keep.",
        ),
        click.option("--seed", default=0, show_default=True, help="For policies that draw."),
    )(function)


def scoring_options(function: Callback) -> Callback:
    """Add ``--list``, ``--text-embeddings`` and ``--centred``: on what, and against what."""
    return _adding(
        click.option(
            "--list",
            "list_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A file that names the pictures of --data to use, one stem a line.",
        ),
        click.option(
            "--text-embeddings",
            type=click.Path(path_type=Path),
            metavar="FILE.npz",
            help="Embeddings of the classes, for a model without a text tower.",
        ),
        click.option(
            "--centred",
            is_flag=True,
            help="Take the mean of the classes' embeddings off each of them before scoring.",
        ),
    )(function)


def _adding(*options: Callable[[Callback], Callback]) -> Callable[[Callback], Callback]:
    def decorate(function: Callback) -> Callback:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
