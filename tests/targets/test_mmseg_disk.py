"""Round trip of checkpoints of mmsegmentation's SAN, in small sizes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import MissingLibraryError, OptionError, TargetError
from ovsprune.jobs.transfer import transfer
from ovsprune.targets import TARGETS, load_into, mmseg_build
from ovsprune.targets.mmseg_build import SanShape, build_san, load_tower, run_san
from tests.targets.by_hand import needs_mmseg, saved, small_slim, small_tower

pytestmark = pytest.mark.framework
TARGET = TARGETS.get("mmseg-san")
CLASSES = ("cat", "dog", "grass", "sky")


def small_san(tower: dict[str, Tensor], seed: int = 0) -> nn.Module:
    needs_mmseg()
    shape = SanShape.small(tower, heads=4, size=32, activation="quick_gelu")
    model = build_san(CLASSES, shape, seed=seed)
    load_tower(model, tower)
    with torch.no_grad():  # as training would
        model.get_parameter("image_encoder.pos_embed").add_(0.25)
    return model


@pytest.fixture(scope="module")
def framework_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a training checkpoint by the framework's engine, with everything that it adds."""
    model = small_san(small_tower())
    import numpy
    from mmengine.logging import HistoryBuffer
    from mmengine.runner.checkpoint import save_checkpoint, weights_to_cpu

    file = tmp_path_factory.mktemp("mmseg") / "iter_10.pth"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    content = {
        "meta": {"epoch": 0, "seed": numpy.int64(3)},
        "state_dict": weights_to_cpu(model.state_dict()),
        "message_hub": {"loss": HistoryBuffer([1.0, 2.0], [1, 1])},
        "optimizer": optimizer.state_dict(),
    }
    save_checkpoint(content, str(file))
    return file


def test_ordinary_reader_refuses_such_a_checkpoint(framework_file: Path) -> None:
    """Shows why the restricted reader is needed."""
    with pytest.raises(Exception, match="[Ww]eights"):
        torch.load(framework_file, weights_only=True)


@pytest.mark.parametrize("weights", ["auto", "target"])
def test_round_trip(tmp_path: Path, framework_file: Path, weights: str) -> None:
    slim = small_slim(text={})
    record = transfer(
        slim=saved(slim, tmp_path / "slim"),
        target="mmseg-san",
        checkpoint=framework_file,
        weights=weights,
        output=tmp_path / "out",
    )
    assert {"meta", "message_hub", "optimizer"} < record["dropped"].keys()
    model = small_san(small_tower())
    assert record["replaced"].keys() | record["kept"].keys() == model.state_dict().keys()
    fresh = small_san(small_tower(seed=5), seed=5)
    assert load_into(fresh, tmp_path / "out") == []
    with TARGET.attach(model, slim, weights="slim"):
        images = torch.randn(1, 3, 64, 64)
        wanted = model.state_dict()
        found = fresh.state_dict()
        missing, unexpected = model.load_state_dict(found, strict=True)
        assert not missing and not unexpected
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert torch.equal(run_san(fresh, images)["logits"], run_san(model, images)["logits"])


def test_names_and_shapes_go_both_ways() -> None:
    tower = small_tower()
    model = small_san(tower)
    layout = TARGET.layout(model.state_dict(), 4)
    back = layout.tower_state(model.state_dict())
    assert back.keys() == tower.keys()
    moved = {**tower, "positional_embedding": tower["positional_embedding"] + 0.25}
    assert all(torch.equal(back[name], tensor) for name, tensor in moved.items())


def test_clip_alone_names_are_the_framework_s(tmp_path: Path) -> None:
    slim = small_slim(
        text={
            "transformer.resblocks.0.mlp.c_proj.weight": torch.ones(32, 128),
            "token_embedding.weight": torch.ones(49408, 32),
            "text_projection": torch.ones(32, 16),
            "attn_mask": torch.ones(2),
        }
    )
    converted = TARGET.convert(None, slim)
    assert converted.state.keys() < small_san(small_tower()).state_dict().keys()
    assert converted.dropped == {"slim: attn_mask": "this framework does not have it"}
    assert converted.state["text_encoder.transformer.0.ffns.0.layers.1.weight"].shape == (32, 128)


def test_every_parameter_is_initialised() -> None:
    model = small_san(small_tower())
    again = small_san(small_tower())
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
    pairs = zip(model.state_dict().items(), again.state_dict().values(), strict=True)
    assert [name for (name, a), b in pairs if not torch.equal(a, b)] == []


def test_builder_refuses_what_the_framework_cannot_build() -> None:
    needs_mmseg()
    with pytest.raises(
        OptionError, match="mlp is 100, expected a multiple of the tower's width, 32"
    ):
        build_san(CLASSES, SanShape(width=32, mlp=100))


def test_put_tower_refuses_another_depth() -> None:
    tower = small_tower()
    model = small_san(tower)
    with pytest.raises(TargetError, match="has 4 CLIP blocks here, the slim tower has 3"):
        load_tower(model, {k: v for k, v in tower.items() if "resblocks.3" not in k})


def test_put_tower_refuses_a_tower_with_a_part_missing() -> None:
    tower = small_tower()
    model = small_san(tower)
    tower.pop("ln_post.bias")
    with pytest.raises(OptionError, match="ln_post.bias'] are in one of them only"):
        load_tower(model, tower)


def test_stub_operators_raise_and_are_removed() -> None:
    needs_mmseg()
    before = sys.modules.get("mmcv._ext")
    with mmseg_build.mmcv_operators():
        extension: Any = sys.modules["mmcv._ext"]
        if isinstance(extension, mmseg_build._ExtensionStub):
            with pytest.raises(MissingLibraryError, match="compiled operator nms is needed"):
                extension.nms(1)
    assert sys.modules.get("mmcv._ext") is before


def test_missing_framework_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmseg_build, "_installed", lambda name: name != "mmseg")
    with pytest.raises(MissingLibraryError, match="mmseg is not installed.*onedl-mmsegmentation"):
        build_san(CLASSES)


def test_deeper_slim_tower_is_refused() -> None:
    slim = small_slim()
    extra = {k.replace("resblocks.3", "resblocks.4"): v for k, v in slim.tensors.items()}
    with pytest.raises(TargetError, match="has 4 CLIP blocks here, the slim tower has 5"):
        TARGET.check(small_san(small_tower()), replace(slim, tensors={**extra, **slim.tensors}))
