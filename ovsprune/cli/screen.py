"""Output of commands: tables, notes and progress bars, and a JSON record."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType

from ovsprune.cli.progress import Bars
from ovsprune.core.errors import OutputError
from ovsprune.core.files import write_text
from ovsprune.core.progress import Progress, Silent

__all__ = ["Screen", "output_options"]

PLAIN_WIDTH = 120
"""Columns without a terminal; most tables do not fit 80."""

Callback = Callable[..., Any]


class Screen:
    """Output of one command.

    Args:
        json_to: File for the record; None for none, ``"-"`` to print only the record on stdout.
        quiet: Show errors only. The record is still written.

    Raises:
        OutputError: ``json_to`` cannot be written; checked before the computation starts.
    """

    def __init__(self, json_to: str | None = None, quiet: bool = False) -> None:
        self.json_to = json_to
        self.quiet = quiet
        self.stdout = sys.stdout  # kept, because output_options redirects sys.stdout to stderr
        self.errors = _console(stderr=True)
        self.tables = self.errors if json_to == "-" else _console(stderr=False)
        self.progress: Progress = Silent() if quiet else Bars(self.errors)
        if json_to not in (None, "-"):
            _check_json(Path(str(json_to)))

    def finish(self, record: Mapping[str, Any], *parts: RenderableType) -> None:
        """Print ``parts`` and write ``record`` as JSON."""
        if not self.quiet:
            for part in parts:
                self.tables.print(part)
        if self.json_to is None:
            return
        # JSON has no NaN; _plain made it null.
        text = json.dumps(_plain(record), indent=2, allow_nan=False) + "\n"
        if self.json_to == "-":
            self.stdout.write(text)
            self.stdout.flush()
        else:
            write_text(
                Path(self.json_to),
                text,
                what=f"--json {self.json_to}",
                remedy="name a writable file",
            )


def output_options(function: Callback) -> Callback:
    """Add ``--json``, ``--quiet`` and ``--debug``; the command gets a ``screen`` for them."""

    @click.option(
        "json_to",
        "--json",
        metavar="FILE",
        help="Write the record of this run as JSON to FILE; '-' prints only the record on stdout.",
    )
    @click.option("--quiet", "-q", is_flag=True, help="Show errors only.")
    @click.option("--debug", is_flag=True, help="Show tracebacks and messages of libraries.")
    @functools.wraps(function)
    def wrapped(*args: Any, json_to: str | None, quiet: bool, debug: bool, **kwargs: Any) -> Any:
        # main() reads --debug itself; here the option is only on the help page.
        screen = Screen(json_to, quiet)
        if json_to != "-":
            return function(*args, screen=screen, **kwargs)
        # Libraries print to stdout, too, which must hold the record alone.
        with redirect_stdout(sys.stderr):
            return function(*args, screen=screen, **kwargs)

    return wrapped


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    # rich reads COLUMNS itself; without it, rich may assume 80 columns.
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    return console


def _check_json(path: Path) -> None:
    if path.is_dir():
        raise OutputError(f"--json {path} is a directory; give a file, or '-' for stdout")
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"--json {path}: directory {path.absolute().parent} does not exist; create it first"
        )


def _plain(value: Any) -> Any:
    """Convert ``value`` to JSON types; NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    # NumPy scalars and tensors with one element have item().
    return _plain(value.item()) if hasattr(value, "item") else str(value)
