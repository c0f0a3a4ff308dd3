"""Code on the pages runs.

Every ``python`` and ``bash`` block has a comment in front: ``<!-- run -->``, or
``<!-- not run: WHY -->``. The blocks of a page that run share a directory and, for Python, one
interpreter's names, in the order of the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>run|not run: [^>]+) -->\n)?"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    mark: str | None
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    return [
        Block(m["mark"], m["language"], m["code"]) for m in BLOCK.finditer(page.read_text("utf-8"))
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# The README opens with its two commands, and nothing stands before them.
OPENING = "make demo   # sets everything up"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_whether_it_runs(page: Path) -> None:
    unmarked = [b.code for b in blocks(page) if b.mark is None and not b.code.startswith(OPENING)]
    assert unmarked == []


def test_blocks_that_run_are_found() -> None:
    found = [name_of(page) for page in PAGES if any(b.mark == "run" for b in blocks(page))]
    assert {"README.md", "docs/quickstart.md", "docs/extend/criterion.md"} <= set(found)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.mark == "run" for b in blocks(p))], ids=name_of
)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    """Blocks run in a directory of their own; consecutive Python blocks in one interpreter."""
    session = ""
    for block in blocks(page):
        if block.mark != "run":
            continue
        if block.language == "python":
            session += block.code + "\n"
        else:
            run_python(session, tmp_path)
            session = ""
            run(["bash", "-euo", "pipefail", "-c", block.code], tmp_path)
    run_python(session, tmp_path)


# What the pages leave at its default is right for a user, and a minute's work for one thread.
FEWER = "import functools, ovsprune; ovsprune.prune = functools.partial(ovsprune.prune, samples=16)"
FEWER_ON_THE_COMMAND_LINE = {"OVSPRUNE_PRUNE_SAMPLES": "16"}


def run_python(code: str, place: Path) -> None:
    if code:
        run([sys.executable, "-c", f"{FEWER}\nexec({code!r})"], place)


def run(command: list[str], place: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        command,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=600,
        # One thread: where cores are shared, threads that wait for each other take far longer.
        env={
            **os.environ,
            **FEWER_ON_THE_COMMAND_LINE,
            "PATH": path,
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
