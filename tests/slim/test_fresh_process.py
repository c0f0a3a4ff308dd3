"""Slim checkpoints of every family, loaded by one process that did not write them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import ovsprune
from ovsprune.jobs.prune import prune
from tests.contracts.conftest import REPRESENTATIVES

OWN_MODULES = ("open_clip-vit", "open_clip-resnet")
"""Families whose slim towers consist of ovsprune's modules."""

# The towers of timm are small models that tests.contracts.conftest registers.
SCRIPT = """
import sys, torch
import ovsprune

def imported(*names):
    return sorted(set(names) & {module.partition(".")[0] for module in sys.modules})

def run(family):
    tower, images = ovsprune.load(family), torch.load(f"{family}/images.pt", weights_only=True)
    torch.save((tower(images), tower.dense(images), tower.tower.state_dict()), f"{family}/out.pt")

threads, own_modules, of_timm = int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(",")
torch.set_num_threads(threads)
with torch.no_grad():
    for family in own_modules:
        run(family)
    assert not imported("open_clip", "timm", "torchvision", "torch_pruning", "transformers")
    run("transformers-vit")
    assert not imported("open_clip", "timm")
    import tests.contracts.conftest
    for family in of_timm:
        run(family)
    assert imported("timm")
"""


def write_checkpoints(place: Path) -> None:
    """Write a slim checkpoint of every family, images, and the outputs, as ``expected.pt``."""
    for family, make in REPRESENTATIVES.items():
        backbone, folder = make(), place / family
        done = prune(backbone, 0.3, output=folder, samples=2, probe=1, criterion="magnitude",
                     allocation="uniform", recovery="none")  # fmt: skip
        images, own = torch.randn(2, 3, *backbone.preprocess.size), ovsprune.load(folder)
        with torch.no_grad():
            outputs = own(images), own.dense(images)
        torch.save((*outputs, done.tower.state_dict()), folder / "expected.pt")
        torch.save(images, folder / "images.pt")


def test_fresh_process_loads_identical_outputs(tmp_path: Path) -> None:
    """Load all families in one process, because its imports take longer than the loading."""
    write_checkpoints(tmp_path)
    of_timm = [f for f in REPRESENTATIVES if f not in (*OWN_MODULES, "transformers-vit")]
    # Sums depend on the number of threads in their last bits.
    words = [str(torch.get_num_threads()), ",".join(OWN_MODULES), ",".join(of_timm)]
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{SCRIPT}"
    ran = subprocess.run([sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True,
                         text=True, timeout=300)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for family in REPRESENTATIVES:
        pooled, dense, state = torch.load(tmp_path / family / "out.pt", weights_only=True)
        expected = torch.load(tmp_path / family / "expected.pt", weights_only=True)
        assert torch.equal(pooled, expected[0]) and torch.equal(dense, expected[1]), family
        assert state.keys() >= expected[2].keys(), family
        assert all(torch.equal(state[n], value) for n, value in expected[2].items()), family
