"""Page about the command line: it lists the commands and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from ovsprune.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"
CONTEXT = click.Context(main, info_name="ovsprune")
COMMANDS = {name: main.get_command(CONTEXT, name) for name in main.list_commands(CONTEXT)}
TABLE = "\n".join(
    line for line in (DOCS / "cli.md").read_text("utf-8").splitlines() if line.startswith("|")
)


def test_the_table_has_the_commands_and_no_other() -> None:
    assert set(re.findall(r"#ovsprune-([a-z]+)\)", TABLE)) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name: str) -> None:
    command = COMMANDS[name]
    assert command is not None and command.help
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert [o.opts for o in options if not o.help] == []
    assert {"--json", "--quiet"} <= {opt for o in options for opt in o.opts}


def commands_in(text: str) -> list[list[str]]:
    """Return the words of every `ovsprune ...` command in the code of a page.

    Words after `--` belong to another program.
    """
    joined = text.replace("\\\n", " ")
    code = re.findall(r"```bash\n(.*?)```", joined, re.DOTALL)
    lines = [
        part for block in code for line in block.splitlines() for part in re.split(r"&&|\|", line)
    ]
    lines += re.findall(r"`(ovsprune [^`\n]+)`", joined)
    ours = [line.split("#")[0].split(" -- ")[0] for line in lines]
    return [line.split() for line in ours if line.strip().startswith("ovsprune ")]


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda p: p.name
)
def test_commands_on_a_page_exist_with_their_options(page: Path) -> None:
    for words in commands_in(page.read_text("utf-8")):
        command = COMMANDS.get(words[1])
        if words[1].startswith("-") or words[1] == "...":
            continue
        assert command is not None, f"{page.name}: {' '.join(words)}"
        known = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
        given = {word.split("=")[0] for word in words[2:] if word.startswith("-") and word != "-"}
        assert given <= known, f"{page.name}: {' '.join(words)}"
