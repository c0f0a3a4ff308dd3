"""Two commands of the README, and the commands that they run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def planned(*args: str) -> str:
    """Return the commands that make would run."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(
        ["make", "--dry-run", *args], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_opens_with_the_two_commands() -> None:
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert block is not None
    assert [line.split("#")[0].strip() for line in block[1].splitlines()] == [
        "make demo",
        "make test",
    ]


@pytest.mark.parametrize(
    "step",
    [
        "ruff check",
        "ruff format --check",
        "mypy",
        "lint-imports",
        "mkdocs build --strict",
        "pytest",
    ],
)
def test_make_test_runs(step: str) -> None:
    assert step in planned("test", "VENV=/nonexistent-environment")


def test_make_demo_sets_up_a_fresh_machine(tmp_path: Path) -> None:
    fresh = planned("demo", f"VENV={tmp_path / 'new'}")
    assert "-m venv" in fresh and "pip install" in fresh and "import open_clip" in fresh
    assert "ovsprune demo" in fresh


def test_make_demo_starts_at_once_the_second_time(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bin/python", ".ready"):
        (tmp_path / name).touch()
    again = planned("demo", f"VENV={tmp_path}")
    assert "pip install" not in again and "ovsprune demo" in again


def test_ci_calls_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "exec make test" in script.read_text("utf-8")
