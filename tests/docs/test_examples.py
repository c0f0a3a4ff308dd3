"""The scripts under examples/ run as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, place: Path, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where examples/prune.py ran, and what it said."""
    place = tmp_path_factory.mktemp("examples")
    return place, run("prune.py", place, "--samples", "16")


def test_prune(pruned: tuple[Path, str]) -> None:
    place, said = pruned
    assert "saved to" in said
    assert (place / "slim" / "example" / "model.safetensors").is_file()


def test_prune_transformers(tmp_path: Path) -> None:
    said = run("prune_transformers.py", tmp_path, "--samples", "8")
    assert "gives what the loaded tower gives: True" in said
    assert (tmp_path / "slim" / "transformers-example" / "model.safetensors").is_file()


def test_transfer_to_san(pruned: tuple[Path, str]) -> None:
    place, _ = pruned
    assert "ovsprune.targets.load(model" in run("transfer_to_san.py", place)
    written = {path.name for path in (place / "transfer" / "example").iterdir()}
    assert written == {"model.safetensors", "transfer.json", "lines.py"}


@pytest.mark.framework
def test_transfer_to_a_live_san(pruned: tuple[Path, str]) -> None:
    pytest.importorskip("mmseg")
    said = run("transfer_to_san.py", pruned[0], "--live")
    assert "mmseg-san:" in said and "dense again, bit for bit: True" in said
