"""Launch of scripts, whose towers are replaced when they are built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError, OptionError, TargetError, UnknownNameError
from ovsprune.launching.command import launch
from ovsprune.slim.cutting import cut_state
from ovsprune.targets import TARGETS
from tests.targets.by_hand import (
    load_pictures,
    needs_mmseg,
    saved,
    small_slim,
    small_tower,
)
from tests.targets.test_alone import GUARD
from tests.tiers import by_default

ROOT = Path(__file__).parents[2]
ALONE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}

# A framework with OpenAI's clip in a place of its own.
CLIP = """
import torch
from torch import nn
from ovsprune.slim.vit import BlockShape, VisionTransformer

def available_models():
    return ["small"]

def load(name, scale=1.0, width=32):
    torch.manual_seed(0)
    shape = BlockShape(4, (0, 1, 2, 3), width // 4, 2 * width)
    model = nn.Module()
    model.visual = VisionTransformer(
        width=width, blocks=[shape] * 4, patch_size=(8, 8), grid_size=(4, 4), output_dim=16,
        activation="quick_gelu",
    )
    for block in model.visual.transformer.resblocks:
        block.attn = nn.MultiheadAttention(width, 4, batch_first=True)
    if name.endswith(".pth"):
        state = torch.load(name)
        model.visual.load_state_dict({k: v * scale for k, v in state.items()})
    return model, "preprocess"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Create a directory with a slim checkpoint, the weights of its base, and a framework."""
    tower = small_tower()
    saved(small_slim(tower), tmp_path / "slim")
    torch.save(tower, tmp_path / "base.pth")
    (tmp_path / "framework").mkdir()
    (tmp_path / "framework" / "__init__.py").write_text("")
    (tmp_path / "framework" / "clip.py").write_text(CLIP)
    return tmp_path


def script(place: Path, text: str) -> list[str]:
    """Write a script that can import ``framework``; return its command."""
    (place / "train.py").write_text(f"import sys\nimport torch\n{text}")
    return [sys.executable, str(place / "train.py")]


def run(place: Path, text: str, **options: Any) -> dict[str, Any]:
    return launch(script(place, text), place / "slim", environment=ALONE, **options)


def slim_state() -> dict[str, Tensor]:
    return small_slim().tower()


def test_vendored_clip_is_replaced_as_it_is_loaded(place: Path, capfd: Any) -> None:
    record = run(
        place,
        f"from framework import clip\nmodel, _ = clip.load({str(place / 'base.pth')!r})\n"
        f"torch.save(model.visual.state_dict(), {str(place / 'out.pth')!r})\nprint('trained')\n",
    )
    assert record["returncode"] == 0
    (report,) = record["replaced"]
    assert report["target"] == "generic" and report["weights"] == "slim"
    assert report["params_after"] < report["params_before"]
    found = torch.load(place / "out.pth")
    assert found.keys() == slim_state().keys()
    assert all(torch.equal(found[name], value) for name, value in slim_state().items())
    out, err = capfd.readouterr()
    assert out == "trained\n"
    assert "ovsprune: generic (Module): " in err and "blocks.0.attn: 3 of 4 heads" in err


@pytest.mark.parametrize(
    ("scale", "weights", "expected"),
    [(1.0, "auto", "slim"), (1.1, "auto", "target"), (1.1, "slim", "slim")],
)
def test_dense_checkpoint_loaded_later_is_cut(
    place: Path, scale: float, weights: str, expected: str
) -> None:
    """Weights are loaded after the model and its optimiser were created."""
    record = run(
        place,
        f"""
from framework import clip
model, _ = clip.load("small")
first = dict(model.named_parameters())
dense = {{f"visual.{{k}}": v * {scale} for k, v in torch.load({str(place / "base.pth")!r}).items()}}
model.load_state_dict(dense)
second = dict(model.named_parameters())
assert first.keys() == second.keys() and all(first[k] is second[k] for k in first)
model.load_state_dict(model.state_dict())  # its own files load as ever
torch.save(model.visual.state_dict(), {str(place / "out.pth")!r})
""",
        weights=weights,
    )
    assert record["replaced"][0]["weights"] == "slim"
    (event,) = record["events"]
    assert f"a dense checkpoint was loaded: the tower has weights {expected}" in event
    slim, tower = small_slim(), {k: v * scale for k, v in small_tower().items()}
    wanted = slim.tower() if expected == "slim" else cut_state(tower, slim.spec, slim.mask)
    found = torch.load(place / "out.pth")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_dense_checkpoint_with_its_misfits_dropped_is_refused(place: Path) -> None:
    """Dropping tensors of another shape would load norms of the dense tower into the slim one."""
    text = f"""
from framework import clip
model, _ = clip.load({str(place / "base.pth")!r})
own = model.state_dict()
dense = {{f"visual.{{k}}": v for k, v in torch.load({str(place / "base.pth")!r}).items()}}
model.load_state_dict({{k: v for k, v in dense.items() if v.shape == own[k].shape}}, strict=False)
"""
    record = run(place, text)
    assert record["returncode"] == 1


def test_only_the_outermost_builder_attaches(place: Path) -> None:
    (place / "transformers").mkdir()
    (place / "transformers" / "__init__.py").write_text("")
    (place / "transformers" / "modeling_utils.py").write_text(
        "from torch import nn\n"
        "class PreTrainedModel(nn.Module):\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, path):\n"
        "        from framework import clip\n"
        "        model = cls()\n"
        "        model.clip = clip.load(path)[0]\n"
        "        attn = model.clip.visual.transformer.resblocks[0].attn\n"
        "        assert not hasattr(attn, 'kept_heads')\n"
        "        return model\n"
    )
    record = run(
        place,
        "from transformers.modeling_utils import PreTrainedModel\n"
        "class Mine(PreTrainedModel): pass\n"
        f"model = Mine.from_pretrained({str(place / 'base.pth')!r})\n"
        "assert type(model) is Mine\n"
        "assert hasattr(model.clip.visual.transformer.resblocks[0].attn, 'kept_heads')\n",
    )
    assert record["returncode"] == 0
    assert [report["model"] for report in record["replaced"]] == ["Mine"]


def test_child_processes_are_hooked(place: Path) -> None:
    """Covers nested Python processes, as of torchrun, and a sitecustomize of the user."""
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text("import sys\nsys.users_own = True\n")
    inner = place / "inner.py"
    inner.write_text(f"import sys\nassert sys.users_own\nfrom framework import clip\n"
                     f"clip.load({str(place / 'base.pth')!r})\n")  # fmt: skip
    record = launch(
        ["sh", "-c", f"{sys.executable} {inner} && {sys.executable} {inner}"],
        place / "slim",
        environment=ALONE | {"PYTHONPATH": f"{place / 'site'}:{ROOT}:{place}"},
    )
    assert record["returncode"] == 0
    assert len({report["pid"] for report in record["replaced"]}) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sys.exit(3)", "ended with status 3 before it built a model"),
        (
            "from framework import clip\nclip.load('small', width=64)",
            r"nothing was replaced: Module: .* class_embedding has shape \(64,\)",
        ),
    ],
)
def test_nothing_replaced_is_an_error(place: Path, text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        run(place, text)


def test_a_python_without_ovsprune_is_stopped(place: Path, capfd: Any) -> None:
    (place / "ovsprune.py").write_text("raise ImportError('none here')")
    command = script(place, "print('went on')")
    with pytest.raises(TargetError, match="ended with status 1"):
        launch(command, place / "slim", environment=ALONE | {"PYTHONPATH": str(place)})
    out, err = capfd.readouterr()
    assert "went on" not in out
    assert "cannot import ovsprune (none here); install it there" in err


def test_named_target_that_refuses_the_tower_stops_the_script(place: Path, capfd: Any) -> None:
    text = "from framework import clip\nclip.load('small', width=64)\nprint('went on')\n"
    with pytest.raises(TargetError, match="status 1"):
        run(place, text, target="generic")
    out, err = capfd.readouterr()
    assert "went on" not in out and "TargetError" in err and "class_embedding has shape" in err


def test_bad_options_are_refused_before_the_command_starts(place: Path) -> None:
    started = script(place, "raise SystemExit('started')")
    with pytest.raises(OptionError, match="there is no program 'pyhton'"):
        launch(["pyhton", "train.py"], place / "slim")
    with pytest.raises(OptionError, match="expected 'slim', 'target' or 'auto'"):
        launch(started, place / "slim", weights="both")
    with pytest.raises(UnknownNameError, match="Did you mean 'san'"):
        launch(started, place / "slim", "sann")
    with pytest.raises(CheckpointError):
        launch(started, place)


def test_command_line(place: Path) -> None:
    text = f"from framework import clip\nclip.load({str(place / 'base.pth')!r})\nprint('out')\n"

    def ovsprune(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ovsprune", "launch", "--slim", "slim", *arguments],
            cwd=place, env=ALONE, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = ovsprune("--json", "-", "--", *script(place, text))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["replaced"][0]["target"] == "generic"
    assert "out\n" in done.stderr
    done = ovsprune("--", *script(place, "import os; assert 'HF_HUB_VERBOSITY' not in os.environ"))
    assert done.returncode == 2
    assert "Error: nothing was replaced: no known builder returned" in done.stderr
    assert ovsprune("--", *script(place, text + "sys.exit(5)")).returncode == 5


def test_with_torch_and_safetensors_alone(place: Path) -> None:
    """Makes parent and child refuse all other imports."""
    child = (
        f"{GUARD}\nallowed.add('framework')\nfrom framework import clip\n"
        f"model, _ = clip.load({str(place / 'base.pth')!r})\n"
        "assert hasattr(model.visual.transformer.resblocks[0].attn, 'kept_heads')\n"
    )
    (place / "alone.py").write_text(child)
    parent = (
        f"{GUARD}\nfrom ovsprune.launching.command import main\n"
        "sys.exit(main(['--slim', 'slim', '--', sys.executable, 'alone.py']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent],
        cwd=place, env=ALONE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ovsprune: generic" in done.stderr


@pytest.mark.framework
def test_clipseg_of_transformers(place: Path) -> None:
    from tests.targets.clipseg_models import clipseg

    clipseg(small_tower()).save_pretrained(place / "dense")
    record = run(
        place,
        f"""
from transformers import CLIPSegForImageSegmentation
model = CLIPSegForImageSegmentation.from_pretrained({str(place / "dense")!r})
learns = [p for n, p in model.named_parameters() if n.startswith("decoder.")]
optimiser = torch.optim.SGD(learns, 0.1)
pictures, words = torch.ones(1, 3, 32, 32), torch.tensor([[1, 7, 9, 63, 0, 0]])
loss = model(pixel_values=pictures, input_ids=words, labels=torch.ones(1, 32, 32)).loss
loss.backward()
optimiser.step()
torch.save(model.state_dict(), {str(place / "out.pth")!r})
""",
    )
    assert record["returncode"] == 0
    assert record["replaced"][0]["target"] == "clipseg"
    found, model = torch.load(place / "out.pth"), clipseg(small_tower())
    decoder = {n: v for n, v in model.state_dict().items() if n.startswith("decoder.")}
    assert any(found[name].ne(value).any() for name, value in decoder.items())
    with TARGETS.get("clipseg").attach(model, small_slim()):
        wanted = {n: v for n, v in model.state_dict().items() if not n.startswith("decoder.")}
    assert {n for n in found if not n.startswith("decoder.")} == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


# Replaces what mmcv lacks here, as its user would have it compiled; and shows that ours goes first.
NO_OPERATORS = """
import sys
from importlib.machinery import ModuleSpec
from ovsprune.targets.mmseg_build import mmcv_operators
held = mmcv_operators()
held.__enter__()
sys.modules["mmcv._ext"].__spec__ = ModuleSpec("mmcv._ext", None)
"""

CONFIG = """
dataset = dict(type='BaseSegDataset', data_root={root!r}, img_suffix='.png',
    metainfo=dict(classes=('a', 'b')),
    data_prefix=dict(img_path='images', seg_map_path='labels'), pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset,
    sampler=dict(type='InfiniteSampler', shuffle=False))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))
default_scope = 'mmseg'
"""


def mmseg_config(place: Path, dense: Any, shape: Any) -> str:
    """Write a configuration of SAN that reads CLIP from a file, and two images."""
    from mmengine import Config
    from torchvision.io import write_png

    from ovsprune.targets.mmseg_build import _config

    for i, picture in enumerate(load_pictures(2, 64)):
        for kind, pixels in (("images", picture.mul(64).add(128)), ("labels", picture[:1].gt(0))):
            (place / kind).mkdir(exist_ok=True)
            write_png(pixels.clamp(0, 255).to(torch.uint8), str(place / kind / f"{i}.png"))
    torch.save(dense.state_dict(), place / "pretrained.pth")
    model = _config(["a", "b"], shape)
    model.pretrained = str(place / "pretrained.pth")
    scale = {"mean": [127.0] * 3, "std": [64.0] * 3, "size": (64, 64)}
    model.data_preprocessor = {"type": "SegDataPreProcessor", **scale}
    file = place / "config.py"
    file.write_text(CONFIG.format(root=str(place)) + f"model = {model.to_dict()!r}\n")
    return str(Config.fromfile(file).filename)


@pytest.mark.framework
@pytest.mark.parametrize("tuned", by_default([False, True], {True}))
def test_mmsegmentation_trains_and_its_tower_stays_slim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuned: bool
) -> None:
    """Runs tools/train.py of mmsegmentation: initialise from a file, load, train, save."""
    needs_mmseg()
    import mmseg

    from ovsprune.targets.mmseg_build import SanShape, build_san, load_tower

    tower = small_tower()
    slim = small_slim(tower)
    saved(slim, tmp_path / "slim")
    shape = SanShape.small(tower, heads=4, size=32, activation="quick_gelu")
    dense = build_san(["a", "b"], shape)
    load_tower(dense, tower)
    config = mmseg_config(tmp_path, dense, shape)
    if tuned:
        load_tower(dense, {name: value * 1.05 for name, value in tower.items()})
        torch.save({"state_dict": dense.state_dict()}, tmp_path / "tuned.pth")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_OPERATORS)
    train = Path(mmseg.__file__).parent / ".mim" / "tools" / "train.py"
    options = [f"load_from={tmp_path / 'tuned.pth'}"] if tuned else []
    record = launch(
        [sys.executable, str(train), config, "--work-dir", str(tmp_path / "work"),
         *(["--cfg-options", *options] if options else [])],
        tmp_path / "slim",
        environment=ALONE | {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"},
    )  # fmt: skip
    assert record["returncode"] == 0
    (report,) = record["replaced"]
    assert report["target"] == "mmseg-san" and report["weights"] == "slim"
    assert "initialised its model: the tower has weights slim" in record["events"][0]
    target = TARGETS.get("mmseg-san")
    found = torch.load(tmp_path / "work" / "iter_2.pth", weights_only=False)["state_dict"]
    before = dense.state_dict()
    layout = target.layout(before, 4)
    with target.attach(dense, slim, weights="target" if tuned else "slim"):
        wanted = {k: v.clone() for k, v in dense.state_dict().items()}
    assert found.keys() == wanted.keys()
    trained = {name for name, p in dense.named_parameters() if p.requires_grad}
    frozen = {name for name in wanted if layout.canonical(name) is not None and name not in trained}
    assert len(frozen) > 40
    assert all(torch.equal(found[name], wanted[name]) for name in frozen)
    adapter = [name for name in trained if "side_adapter" in name]
    assert any(not torch.equal(found[name], before[name]) for name in adapter)
    assert len(record["events"]) == (2 if tuned else 1)
    if tuned:
        assert "a dense checkpoint was loaded: the tower has weights target" in record["events"][1]
