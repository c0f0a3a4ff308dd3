"""``pip install --no-deps ovsprune`` is enough to read, attach and load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ovsprune.slim.read import SlimCheckpoint

SCRIPT = """
import builtins, importlib.abc, os, sys
import torch, safetensors.torch

# What torch brings with it is there in any case; everything else is refused to everybody.
torchs = {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "triton"}
present = {name.partition(".")[0] for name in sys.modules} | torchs
allowed = present | set(sys.stdlib_module_names) | {"ovsprune", "torch", "safetensors", "numpy"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"refused: {name}")

sys.meta_path.insert(0, Refuse())

# And we ourselves may not lean on what torch happens to have imported.
ours = set(sys.stdlib_module_names) | {"ovsprune", "torch", "safetensors"}
original = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    asker = (globals or {}).get("__name__", "")
    if asker.partition(".")[0] == "ovsprune" and not level and name.partition(".")[0] not in ours:
        raise ModuleNotFoundError(f"refused to {asker}: {name}")
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = guarded

for name in ("open_clip", "torchvision", "scipy", "rich"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert "refused" in str(error), error
    else:
        raise AssertionError(f"{name} could be imported: this test proves nothing")

import ovsprune
from ovsprune.slim.vit import BlockShape, VisionTransformer

directory = sys.argv[1]
checkpoint = ovsprune.read(directory)
slim = ovsprune.load(directory)
images = torch.randn(1, 3, 64, 64)

# a dense tower, as an environment would build it
shape = BlockShape(4, (0, 1, 2, 3), 12, 96)
dense = VisionTransformer(
    width=48, blocks=[shape] * 3, patch_size=(16, 16), grid_size=(4, 4), output_dim=24,
    activation="quick_gelu",
).eval()
for block in dense.transformer.resblocks:
    block.attn = torch.nn.MultiheadAttention(48, 4, batch_first=True).eval()
for weights in ("target", "slim"):
    with torch.no_grad():
        before = dense(images)
        applied = ovsprune.apply(dense, checkpoint, weights=weights)
        out = dense(images)
        if weights == "slim":
            assert torch.allclose(out, slim(images), atol=1e-5)
        applied.detach()
        assert torch.equal(dense(images), before)

from ovsprune.masks import apply_masks, read_masks, write_masks

masks = {"conv1.weight": dense.conv1.weight > 0}
for name, form in (("masks.safetensors", "ovsprune"), ("masks.pth", "torch")):
    found = read_masks(write_masks(name, masks, form=form))
    assert torch.equal(found["conv1.weight"], masks["conv1.weight"])
assert apply_masks(dense, found).zeros == int((~masks["conv1.weight"]).sum())

assert slim.dense(torch.randn(1, 3, 96, 64)).shape == (1, 24, 6, 4)
try:
    ovsprune.load_open_clip(directory)
except ovsprune.OvspruneError as error:
    print(error)
"""


def test_reads_attaches_and_loads_with_torch_and_safetensors_alone(
    checkpoint: SlimCheckpoint, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint.path)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "holds no text tower" in done.stdout
