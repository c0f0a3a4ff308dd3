"""Test of the example script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.targets.by_hand import MiniSan, saved, small_slim, small_tower

ROOT = Path(__file__).parents[2]


def test_transfer_to_san_runs(tmp_path: Path) -> None:
    saved(small_slim(), tmp_path / "slim")
    torch.save({"model": MiniSan.with_tower(small_tower()).state_dict()}, tmp_path / "san.pth")
    script = ROOT / "examples" / "transfer_to_san.py"
    arguments = ["--slim", "slim", "--checkpoint", "san.pth", "--output", "out"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "weights: slim" in done.stdout and "ovsprune.targets.load_into(model" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
