"""``ovsprune``: group of commands and error handling."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from ovsprune.cli.listing import LISTS, list_command
from ovsprune.cli.silence import silence_libraries, verbose
from ovsprune.core.errors import OvspruneError, UnknownNameError

__all__ = ["main"]

# Order of the help page: commands for newcomers first.
COMMANDS = (
    "demo",
    "prune",
    "transfer",
    "launch",
    "inspect",
    "evaluate",
    "compare",
    "benchmark",
    "export",
    "spectrum",
    "schedule",
    *LISTS,
)

USER_ERROR = 2  # as click's usage errors
INTERRUPTED = 130  # 128 + SIGINT, as in shells


class LazyGroup(click.Group):
    """Group of commands that are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of :data:`COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name in LISTS:
            return list_command(cmd_name)
        command = importlib.import_module(f"ovsprune.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command as click does; an error for an unknown one names the closest."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise UnknownNameError("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; report a user error as one message with exit status 2."""
        arguments = list(args) if args is not None else sys.argv[1:]
        debug = verbose(arguments)
        # Before a command is imported, because libraries read their variables then.
        silence_libraries(debug)
        try:
            # Not standalone: click would exit, and print errors in its own form.
            result = super().main(arguments, prog_name or "ovsprune", complete_var, False, **extra)
        except OvspruneError as error:
            _fail(str(error), error if debug else None)
        except click.ClickException as error:
            error.show()
            sys.exit(USER_ERROR)
        except (KeyboardInterrupt, click.Abort):
            click.echo("\nStopped.", err=True)
            sys.exit(INTERRUPTED)
        # An integer is the status of `launch`, or click's exit code of --help.
        sys.exit(result if isinstance(result, int) else 0)


def _fail(message: str, error: BaseException | None) -> NoReturn:
    if error is not None:
        traceback.print_exception(error)
    click.echo(click.style("Error: ", fg="red", bold=True) + message, err=True)
    sys.exit(USER_ERROR)


# \b keeps click from refilling the lines of a paragraph.
HELP = """Prune CLIP-like image towers for open-vocabulary segmentation frameworks.

\b
Start here:
  ovsprune demo                                   run all steps, in minutes
  ovsprune prune --model ViT-B/16 --ratio 0.5     remove half of the MACs
  ovsprune transfer --target san                  put the tower into a framework
  ovsprune launch -- python train_net.py ...      or run the framework's script with it
"""


@click.group(
    cls=LazyGroup,
    help=HELP,
    # The prefix makes OVSPRUNE_PRUNE_RATIO the variable of `prune --ratio`.
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "OVSPRUNE"},
)
@click.version_option(package_name="ovsprune")
def main() -> None:
    """Run the command line; see :data:`HELP`."""
