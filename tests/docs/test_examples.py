"""Scripts under examples/, run as a reader would run them."""

from __future__ import annotations

import json
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from safetensors.torch import save_file

from ovsprune.backbones.open_clip_model import build_clip

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, place: Path, *args: str) -> str:
    """Run a script as ``__main__`` in ``place`` and return what it prints.

    It runs in this process, because the imports of a new one take longer than most scripts;
    ``tests/targets/test_example.py`` runs one in a process of its own.
    """
    output = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.chdir(place)
        patch.setattr(sys, "argv", [name, *args])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return output.getvalue()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the directory in which examples/prune.py ran, and its output."""
    place = tmp_path_factory.mktemp("examples")
    return place, run("prune.py", place, "--samples", "4")


def test_prune(pruned: tuple[Path, str]) -> None:
    place, said = pruned
    assert "saved to" in said
    assert (place / "slim" / "example" / "model.safetensors").is_file()


def test_prune_transformers(tmp_path: Path) -> None:
    said = run("prune_transformers.py", tmp_path, "--samples", "4")
    assert "gives what the loaded tower gives: True" in said
    assert (tmp_path / "slim" / "transformers-example" / "model.safetensors").is_file()


@pytest.mark.slow
def test_prune_convnext(tmp_path: Path) -> None:
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"timm_model_name": "convnext_atto", "timm_pool": "", "image_size": 32}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path / "atto"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(build_clip(config).state_dict(), folder / "open_clip_model.safetensors")
    said = run("prune_convnext.py", tmp_path, "--model", str(folder), "--samples", "4")
    assert "stage (1, 320, 1, 1)" in said and "bit for bit: True" in said
    assert "trunk.stages.0.blocks.0.mlp:" in said


def test_prune_resnet(tmp_path: Path) -> None:
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "patch_size": None}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(build_clip(config).state_dict(), folder / "open_clip_model.safetensors")
    options = ("--model", str(folder), "--pretrained", "none", "--samples", "4")
    said = run("prune_resnet.py", tmp_path, *options)
    assert "layer4.0.conv2: " in said and "bit for bit: True" in said
    assert "stage (1, 256, 2, 2)" in said and "dense features (1, 24, 4, 4)" in said


def test_transfer_to_san(pruned: tuple[Path, str]) -> None:
    place, _ = pruned
    assert "ovsprune.targets.load_into(model" in run("transfer_to_san.py", place)
    written = {path.name for path in (place / "transfer" / "example").iterdir()}
    assert written == {"model.safetensors", "transfer.json", "lines.py"}


@pytest.mark.slow
def test_run_onnx(pruned: tuple[Path, str]) -> None:
    place, _ = pruned
    said = run("run_onnx.py", place)
    assert "standard deviations of the output" in said
    assert "pooled (1, " in said and "dense (1, " in said
    assert (place / "export" / "example.onnx").is_file()


@pytest.mark.framework
def test_transfer_to_a_live_san(pruned: tuple[Path, str]) -> None:
    pytest.importorskip("mmseg")
    said = run("transfer_to_san.py", pruned[0], "--live")
    assert "mmseg-san:" in said and "dense again, bit for bit: True" in said


@pytest.mark.framework
def test_finetune_san(pruned: tuple[Path, str]) -> None:
    pytest.importorskip("mmseg")
    said = run("finetune_san.py", pruned[0], "--steps", "3", "--fraction", "0.4")
    assert "TrainPlan(alpha: 11 of 26 layers train" in said and "GFLOPs" in said
    losses = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("step ")]
    assert len(losses) == 3 and losses[-1] < losses[0]
