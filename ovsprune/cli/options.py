"""Options shared by several commands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

__all__ = [
    "ACTIVATION",
    "MODEL",
    "PATH",
    "PRETRAINED",
    "SLIM",
    "THREADS",
    "WEIGHTS",
    "batch_sizes",
    "compute_options",
    "default_option",
    "output",
    "schedule_options",
    "scoring_options",
]

Callback = Callable[..., Any]
Decorator = Callable[[Callback], Callback]

PATH = click.Path(path_type=Path)
"""Type of a file or a directory, which a job checks."""

default_option = partial(click.option, show_default=True)
"""Option whose default is on the help page."""

MODEL = click.option("--model", required=True, help="Model name or slim directory.")
PRETRAINED = click.option("--pretrained", help="Weights: a tag of open_clip, a file, or 'none'.")
ACTIVATION = click.option(
    "--activation", help="gelu or quick_gelu, for a weights file that does not name it."
)
THREADS = click.option("--threads", type=int, help="CPU threads; by default PyTorch's choice.")
SLIM = click.option(
    "--slim", type=PATH, metavar="DIR", help="Slim checkpoint; by default the newest under slim/."
)
WEIGHTS = default_option(
    "--weights",
    default="auto",
    help="slim (the framework uses the frozen base CLIP), target (it finetuned CLIP), or auto.",
)


def output(help: str, metavar: str = "DIR", **attributes: Any) -> Decorator:
    """Return the option ``--output``, a path."""
    return click.option("--output", "-o", type=PATH, metavar=metavar, help=help, **attributes)


def batch_sizes(default: tuple[int, ...], help: str) -> Decorator:
    """Return the option ``--batch-size`` that may be repeated."""
    return default_option("--batch-size", "batch_sizes", multiple=True, default=default, help=help)


def compute_options(*, batch_size: bool = False, dtype: bool = True) -> Decorator:
    """Add ``--device`` and ``--threads``, and ``--dtype`` and ``--batch-size`` if wanted."""
    options = [default_option("--device", default="cpu", help="cpu, cuda, cuda:1 ...")]
    if dtype:
        options.append(
            default_option("--dtype", default="float32", help="float32, bfloat16, float16.")
        )
    if batch_size:
        options.append(default_option("--batch-size", default=16, help="Batch size."))
    return _all_of(*options, THREADS)


def schedule_options(function: Callback) -> Callback:
    """Add the options of a policy: ``--fraction, --count, --every, --pool, --rest, --seed``."""
    return _all_of(
        default_option(
            "--fraction", default=0.5, help="Fraction of the layers that train, 0 to 1."
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
        default_option(
            "--rest",
            default="follow",
            help="Norms, biases and positions: follow (their layer), train, freeze or keep.",
        ),
        default_option("--seed", default=0, help="Seed of random policies."),
    )(function)


def scoring_options(function: Callback) -> Callback:
    """Add the options of an evaluation: ``--list``, ``--text-embeddings`` and ``--centred``."""
    return _all_of(
        click.option(
            "--list",
            "list_file",
            type=PATH,
            metavar="FILE",
            help="File with the names of the images of --data to use, one stem per line.",
        ),
        click.option(
            "--text-embeddings",
            type=PATH,
            metavar="FILE.npz",
            help="Class embeddings, for a model without a text tower.",
        ),
        click.option(
            "--centred",
            is_flag=True,
            help="Subtract the mean of the class embeddings before scoring.",
        ),
    )(function)


def _all_of(*options: Decorator) -> Decorator:
    """Return a decorator that adds the options, in this order on the help page."""

    def decorate(function: Callback) -> Callback:
        # The decorator that is applied last comes first on the help page.
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
