"""Launch of MendelXu/SAN's train_net.py: it trains, and its tower stays slim."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import write_jpeg, write_png

from ovsprune.launching.command import launch
from ovsprune.targets import TARGETS
from tests.targets import san_upstream as upstream
from tests.targets.by_hand import saved
from tests.targets.test_san_upstream import small, small_slim, tower

pytestmark = pytest.mark.upstream

TARGET = TARGETS.get("san")

# What the script needs of other libraries and has not here: a tracker, an old numpy's names, and a
# small CLIP that open_clip knows.
SITE = """
import sys, types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
import numpy
numpy.int = int
if find_spec("wandb") is None:
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = wandb.log = wandb.finish = lambda *a, **k: None
    sys.modules["wandb"] = wandb
import open_clip
open_clip.add_model_config({directory!r})
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write images in SAN's data directory, a file of CLIP's weights, and a slim checkpoint."""
    upstream.repository()
    monkeypatch.chdir(tmp_path)
    pictures, labels = Path("coco/train2017"), Path("coco/stuffthingmaps_detectron2/train2017")
    for directory in (pictures, labels):
        directory.mkdir(parents=True)
    for i, picture in enumerate(upstream.pictures(4, 96).to(torch.uint8)):
        write_jpeg(picture, str(pictures / f"{i}.jpg"))
        label = (picture[:1] > 128).to(torch.uint8) + 2 * (picture[1:2] > 160).to(torch.uint8)
        write_png(label % 3, str(labels / f"{i}.png"))
    (tmp_path / "clip").mkdir()
    upstream.small_clip(tmp_path / "clip")
    (tmp_path / "site").mkdir()
    site = SITE.format(directory=str(tmp_path / "clip"))
    (tmp_path / "site" / "sitecustomize.py").write_text(site)
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.create_model("small-vit")
    clip.visual.load_state_dict(tower())
    torch.save(clip.state_dict(), tmp_path / "clip.pth")
    saved(small_slim(), tmp_path / "slim")
    return tmp_path


def train(place: Path, *options: Any, weights: str = "auto") -> dict[str, Any]:
    """Run two iterations of SAN's script."""
    given = [
        *("MODEL.DEVICE", "cpu"),
        *("MODEL.SAN.CLIP_MODEL_NAME", "small-vit"),
        *("MODEL.SAN.CLIP_PRETRAINED_NAME", str(place / "clip.pth")),
        *upstream.SMALL_OPTIONS,
        *("SOLVER.MAX_ITER", 2),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.AMP.ENABLED", False),
        *("DATASETS.TEST", ()),
        *("TEST.EVAL_PERIOD", 0),
        *("DATALOADER.NUM_WORKERS", 0),
        *("INPUT.MIN_SIZE_TRAIN", (96,)),
        *("INPUT.CROP.SIZE", (64, 64)),
        *("INPUT.SIZE_DIVISIBILITY", 64),
        *("OUTPUT_DIR", str(place / "out")),
        *options,
    ]
    repository = upstream.repository()
    config = repository / "configs" / upstream.BASE
    root = Path(__file__).parents[2]
    paths = [str(place / "site"), str(root), os.environ.get("PYTHONPATH", "")]
    return launch(
        [sys.executable, str(repository / "train_net.py"), "--config-file", str(config),
         "--num-gpus", "0", *map(str, given)],
        place / "slim",
        weights=weights,
        environment={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "DETECTRON2_DATASETS": str(place),
        },
    )  # fmt: skip


def saved_state(place: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(place / "out" / "model_final.pth", weights_only=False)["model"])


def test_trains_with_clips_weights(place: Path) -> None:
    record = train(place)
    assert record["returncode"] == 0
    (report,) = record["replaced"]
    assert (report["target"], report["model"], report["weights"]) == ("san", "SAN", "slim")
    assert record["events"] == []
    found = saved_state(place)
    layout = TARGET.layout(found, upstream.SMALL["depth"])
    for name, value in small_slim().tower().items():
        if name not in layout.stays:
            (place_of,) = layout.to_framework(name, value)
            assert torch.equal(found[place_of], value), name
    trained = found["clip_visual_extractor.positional_embedding"]
    start = tower()["positional_embedding"]
    assert trained.shape == start.shape and not torch.equal(trained, start), "SAN trains them"


@pytest.mark.parametrize("tuned", [False, True], ids=["of the base", "finetuned"])
def test_dense_checkpoint_of_san_is_cut_as_it_is_loaded(place: Path, tuned: bool) -> None:
    """Loads MODEL.WEIGHTS, of which detectron2 would drop tensors of another shape."""
    from detectron2.checkpoint import DetectionCheckpointer

    dense = small(place / "clip", classes=171)
    if tuned:
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                if TARGET.layout(dense.state_dict(), 4).canonical(name) is not None:
                    parameter.mul_(1.05)
    DetectionCheckpointer(dense, save_dir=str(place)).save("dense")
    record = train(place, "MODEL.WEIGHTS", str(place / "dense.pth"), "SOLVER.BASE_LR", 0.0)
    assert record["returncode"] == 0
    (event,) = record["events"]
    expected = "target" if tuned else "slim"
    assert f"a dense checkpoint was loaded: the tower has weights {expected}" in event
    found = saved_state(place)
    with TARGET.attach(dense, small_slim(), weights=expected):
        wanted = dense.state_dict()
        assert list(wanted) == list(found)
        assert [name for name, v in wanted.items() if not torch.equal(found[name], v)] == []
