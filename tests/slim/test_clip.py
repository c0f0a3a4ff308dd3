from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.core.records import Preprocess
from ovsprune.slim.clip import load_open_clip
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.load import load
from ovsprune.slim.read import read
from ovsprune.slim.write import write

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 64, "layers": 3, "width": 48, "head_width": 12, "patch_size": 16,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    "quick_gelu": True,
}  # fmt: skip


@pytest.fixture
def save(make_tower: Callable[..., nn.Module], slim_spec: Any, tmp_path: Path) -> Any:
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.CLIP(**CONFIG).eval()
    clip.visual.load_state_dict(make_tower().state_dict())

    def to(text: bool = True, **changes: Any) -> tuple[Path, nn.Module]:
        state = {k.removeprefix("visual."): v for k, v in clip.visual.state_dict().items()}
        spec, mask = slim_spec(state, **{"architecture": CONFIG, **changes})
        tensors = {f"visual.{k}": v for k, v in cut_state(state, spec, mask).items()}
        if text:
            own = clip.state_dict().items()
            tensors |= {k: v for k, v in own if not k.startswith("visual.")}
        return write(tmp_path / "clip", spec, tensors, mask, card=""), clip

    return to


@torch.no_grad()
def test_loaded_clip_equals_dense_text_tower_and_slim_image_tower(
    save: Any, images: torch.Tensor
) -> None:
    from PIL import Image

    path, dense = save()
    model, train, preprocess = load_open_clip(path)
    words = torch.randint(0, 50, (3, 8))
    assert torch.equal(model.encode_text(words), dense.encode_text(words))
    assert torch.equal(model.logit_scale, dense.logit_scale)
    torch.testing.assert_close(model.encode_image(images), load(path)(images), atol=1e-5, rtol=0)
    assert not torch.allclose(model.encode_image(images), dense.encode_image(images), atol=1e-2)
    assert not model.training
    picture = Image.new("RGB", (100, 80), (255, 0, 0))
    assert preprocess(picture).shape == train(picture).shape == (3, 64, 64)
    mean, std = read(path).spec.preprocess.mean, read(path).spec.preprocess.std
    torch.testing.assert_close(preprocess(picture)[0, 0, 0].item(), (1 - mean[0]) / std[0])


def test_checkpoint_without_text_tower_is_refused(save: Any) -> None:
    path, _ = save(text=False)
    with pytest.raises(CheckpointError, match=r"holds no text tower; .* ovsprune\.load"):
        load_open_clip(path)


def test_checkpoint_of_another_library_is_refused(save: Any) -> None:
    path, _ = save(library="timm")
    with pytest.raises(CheckpointError, match="was written for timm, not for open_clip"):
        load_open_clip(path)


def test_missing_open_clip_is_reported(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = save()
    found = importlib.import_module

    def refuse(name: str) -> Any:
        if name == "open_clip":
            raise ModuleNotFoundError("No module named 'open_clip'")
        return found(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(MissingLibraryError, match=r"needs open_clip_torch 3\.3\.0 or newer .*pip"):
        load_open_clip(path)


def test_architecture_that_open_clip_cannot_build_is_refused(
    save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    monkeypatch.delattr(open_clip, "__version__")  # as up to 2.24
    path, _ = save(architecture={**CONFIG, "unheard_of": 1})
    with pytest.raises(CheckpointError, match="cannot build this architecture .*unheard_of"):
        load_open_clip(path)


def test_text_tower_of_another_width_is_refused(save: Any) -> None:
    text = {**CONFIG["text_cfg"], "width": 32}  # type: ignore[dict-item]
    path, _ = save(architecture={**CONFIG, "text_cfg": text})
    with pytest.raises(CheckpointError, match="the text tower does not fit the architecture"):
        load_open_clip(path)


def old_transform(image_size: Any, is_train: bool, mean: Any = None, std: Any = None) -> str:
    """Transform of open_clip up to 2.20, without options for resizing."""
    return f"{image_size} {is_train}"


def test_old_open_clip_with_matching_fixed_transform_is_accepted(
    save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    monkeypatch.setattr(open_clip, "image_transform", old_transform)
    path, _ = save()
    assert load_open_clip(path)[1:] == ("(64, 64) True", "(64, 64) False")


def test_old_open_clip_with_other_fixed_transform_is_refused(
    save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    monkeypatch.setattr(open_clip, "image_transform", old_transform)
    monkeypatch.delattr(open_clip, "__version__")  # open_clip had none then
    path, _ = save(preprocess=Preprocess((64, 64), resize_mode="squash"))
    with pytest.raises(
        MissingLibraryError,
        match=r"resize_mode 'shortest' only, the checkpoint needs 'squash'; install .* 3\.3\.0",
    ):
        load_open_clip(path)
