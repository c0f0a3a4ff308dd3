"""``ovsprune``: the group of commands, and what happens when one of them fails."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from ovsprune.cli.silence import silence_libraries, verbose
from ovsprune.core.errors import OvspruneError, UnknownNameError

__all__ = ["main"]

# In the order of the help page: what a newcomer needs first stands first.
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
    "models",
    "targets",
    "criteria",
)

USER_ERROR = 2
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for.

    A command's file imports nothing heavy either: its job is imported when it runs.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order of :data:`COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"ovsprune.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, but an unknown command is answered with the closest ones."""
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
        """Run a command; an error of the user's is one message and exit status 2."""
        given = list(args) if args is not None else sys.argv[1:]
        debug = verbose(given)
        silence_libraries(debug)
        try:
            result = super().main(given, prog_name or "ovsprune", complete_var, False, **extra)
        except OvspruneError as error:
            _fail(str(error), error if debug else None)
        except click.ClickException as error:
            error.show()
            sys.exit(USER_ERROR)
        except (KeyboardInterrupt, click.Abort):
            click.echo("\nStopped.", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(result if isinstance(result, int) else 0)


def _fail(message: str, error: BaseException | None) -> NoReturn:
    if error is not None:
        traceback.print_exception(error)
    click.echo(click.style("Error: ", fg="red", bold=True) + message, err=True)
    sys.exit(USER_ERROR)


HELP = """Prune CLIP-like image towers, and put them into open-vocabulary segmentation frameworks.

\b
Start here:
  ovsprune demo                                   the whole of it, in minutes
  ovsprune prune --model ViT-B/16 --ratio 0.5     a tower with half of the MACs
  ovsprune transfer --target san                  the framework's checkpoint with it
  ovsprune launch -- python train_net.py ...      or its own script, with it
"""


@click.group(
    cls=LazyGroup,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "OVSPRUNE"},
)
@click.version_option(package_name="ovsprune")
def main() -> None:
    """The command line; see :data:`HELP`."""
