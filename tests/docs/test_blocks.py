"""Code on the pages runs.

Every ``python`` and ``bash`` block has a comment in front: ``<!-- run -->``, or
``<!-- not run: WHY -->``. The blocks of a page that run share a directory and, for Python, one
interpreter's names, in the order of the page.
"""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

import ovsprune
from ovsprune.cli.main import main
from ovsprune.importance import CRITERIA
from ovsprune.profiling import towers
from ovsprune.schedules import POLICIES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>run|not run: [^>]+) -->\n)?"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """Fenced block of a page."""

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
def test_every_block_is_marked_as_run_or_not(page: Path) -> None:
    unmarked = [b.code for b in blocks(page) if b.mark is None and not b.code.startswith(OPENING)]
    assert unmarked == []


def test_blocks_that_run_are_found() -> None:
    found = [name_of(page) for page in PAGES if any(b.mark == "run" for b in blocks(page))]
    assert {"README.md", "docs/quickstart.md", "docs/extend/criterion.md"} <= set(found)


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(b.mark == "run" for b in blocks(p))],
    ids=name_of,
)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in a directory of their own and with one set of Python names.

    Everything runs in this process, because the imports of a new one take longer than most blocks.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OVSPRUNE_PRUNE_SAMPLES", str(IMAGES))
    monkeypatch.setattr(ovsprune, "prune", partial(ovsprune.prune, samples=IMAGES, **CHEAP))
    # Each measurement starts a process; tests/jobs/test_benchmark.py runs them.
    monkeypatch.setattr(towers, "peak_memory", lambda *task, **options: None)
    for registry in (CRITERIA, POLICIES):
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.mark != "run":
            continue
        if block.language == "python":
            exec(compile(block.code, f"{name_of(page)} ({block.language})", "exec"), names)
        else:
            run_commands(block.code)


IMAGES = 4
CHEAP: dict[str, Any] = {
    "criterion": "magnitude",
    "allocation": "uniform",
    "recovery": "closed-form",
}
"""Options that a page leaves out: the defaults suit users, and take minutes on one thread."""


def run_commands(code: str) -> None:
    """Run a block that consists of ``ovsprune`` commands, with fewer calibration images."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "ovsprune", f"a block that runs calls ovsprune only: {line}"
        if words[1] == "prune" and not {"--method", "--config"} & set(words):
            words += [word for name, value in CHEAP.items() for word in (f"--{name}", value)]
        if "--samples" in words:
            words[words.index("--samples") + 1] = str(IMAGES)
        done = CliRunner().invoke(main, words[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}"
