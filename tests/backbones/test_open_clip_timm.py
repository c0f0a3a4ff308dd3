"""Loading towers of open_clip's TimmModel with their text towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ovsprune import backbones
from ovsprune.backbones import FAMILIES, open_clip_source
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.core.errors import WeightsError
from tests.contracts.conftest import of_timm, open_clip_convnext_conv

CONFIG = of_timm("ovsprune_convnext_conv", image_size=64)


def clip(config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state of a CLIP with the tower of the representative model."""
    model = build_clip(config)
    model.get_submodule("visual").load_state_dict(open_clip_convnext_conv().tower.state_dict())
    return dict(model.state_dict())


def folder(directory: Path, config: dict[str, Any], state: dict[str, Tensor]) -> str:
    directory.mkdir()
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(
        {k: v.contiguous() for k, v in state.items()}, directory / "open_clip_model.safetensors"
    )
    return str(directory)


def with_text(**text: Any) -> dict[str, Any]:
    return {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], **text}}


def test_clip_with_a_separate_text_module(tmp_path: Path) -> None:
    import open_clip

    config = {**CONFIG, "custom_text": True, "init_logit_bias": -10}
    state = clip(config)
    directory = folder(tmp_path / "custom", config, state)
    loaded = backbones.load_backbone(directory)
    reference = open_clip.create_model(f"local-dir:{directory}").eval()
    tokens = open_clip.tokenizer.SimpleTokenizer(context_length=8)(["a cat", "two dogs"])
    with torch.no_grad():
        expected = reference.encode_text(tokens, normalize=True)
    torch.testing.assert_close(loaded.encode_text(["a cat", "two dogs"]), expected)
    assert set(loaded.text) == {k for k in state if not k.startswith("visual.")}
    assert {"text.token_embedding.weight", "logit_bias"} <= set(loaded.text)


def test_text_names_of_older_files_are_converted(tmp_path: Path) -> None:
    config = {**CONFIG, "custom_text": True}
    new = clip(config)
    old = {k.removeprefix("text."): v for k, v in new.items()}
    old["logit_scale"] = old["logit_scale"].reshape(1)
    loaded = backbones.load_backbone(folder(tmp_path / "old", config, old))
    assert {k: v.shape for k, v in loaded.text.items()} == {
        k: v.shape for k, v in new.items() if not k.startswith("visual.")
    }
    assert loaded.has_text


def test_half_precision_is_converted_to_float(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in clip(CONFIG).items()}
    loaded = backbones.load_backbone(folder(tmp_path / "half", CONFIG, state))
    assert {p.dtype for p in loaded.tower.parameters()} == {torch.float32}
    assert loaded.encode_text(["a cat"]).shape == (1, 24)


def test_text_tower_of_a_hub_is_kept_with_a_note(tmp_path: Path) -> None:
    config = with_text(hf_model_name="nobody/a-text-tower")
    loaded = backbones.load_backbone(folder(tmp_path / "hub", config, clip(CONFIG)))
    assert not loaded.has_text and loaded.text  # it is saved with the slim tower
    assert any("nobody/a-text-tower" in note and "lives on a hub" in note for note in loaded.notes)
    with pytest.raises(WeightsError, match="--text-embeddings FILE"):
        loaded.encode_text(["a cat"])


def test_preprocessing_of_the_tag_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    file = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in clip(CONFIG).items()}, file)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: CONFIG)
    monkeypatch.setattr(
        open_clip_source, "resolve", lambda name, tag: (file, {"mean": (0.5, 0.5, 0.5)})
    )
    loaded = FAMILIES.get("open_clip-convnext").load("convnext_tiny", "laion", None)
    assert (loaded.name, loaded.pretrained, loaded.trained) == ("convnext_tiny", "laion", True)
    assert loaded.preprocess.mean == (0.5, 0.5, 0.5) and loaded.preprocess.size == (64, 64)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.pooled(images), open_clip_convnext_conv().pooled(images))
