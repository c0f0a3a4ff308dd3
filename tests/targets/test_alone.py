"""Transfers, live and on disk, in an environment with torch and safetensors only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.slim.test_alone import SCRIPT
from tests.targets.by_hand import saved, small_slim

GUARD = SCRIPT.partition("import ovsprune\n")[0]

LIVE = """
import ovsprune, ovsprune.targets
from torch import nn
from ovsprune.slim.vit import BlockShape, VisionTransformer

def build():
    torch.manual_seed(0)
    shape = BlockShape(4, (0, 1, 2, 3), 8, 64)
    tower = VisionTransformer(
        width=32, blocks=[shape] * 4, patch_size=(8, 8), grid_size=(4, 4), output_dim=16,
        activation="quick_gelu",
    )
    for block in tower.transformer.resblocks:
        block.attn = nn.MultiheadAttention(32, 4, batch_first=True)
    model = nn.Module()  # with SAN's names
    model.clip_visual_extractor, model.clip_rec_head = nn.Module(), nn.Module()
    for name in ("class_embedding", "positional_embedding", "conv1", "ln_pre"):
        setattr(model.clip_visual_extractor, name, getattr(tower, name))
    for name in ("ln_post", "proj"):
        setattr(model.clip_rec_head, name, getattr(tower, name))
    model.clip_visual_extractor.resblocks = tower.transformer.resblocks[:3]
    model.clip_rec_head.resblocks = tower.transformer.resblocks[3:]
    return model

model = build()
report = ovsprune.transfer(model, ovsprune.load(sys.argv[1]), weights="slim")
assert report.target == "san" and report.params_after < report.params_before
record = ovsprune.transfer(slim=sys.argv[1], target="san", output="out")
fresh = build()
ovsprune.targets.load_into(fresh, "out")
state = fresh.state_dict()
assert all(torch.equal(state[k], v) for k, v in model.state_dict().items() if "positional" not in k)
report.detach()
print("done", report.counted_on)
"""


def test_transfers_with_torch_and_safetensors_alone(tmp_path: Path) -> None:
    saved(small_slim(text={}), tmp_path / "slim")
    done = subprocess.run(
        [sys.executable, "-c", GUARD + LIVE, "slim"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "done nothing, since the target has no input" in done.stdout
