"""Weights: the hub's cache, the hub out of reach, files that fit and files that do not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ovsprune import backbones
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.core.errors import OptionError, UnknownNameError, WeightsError

REPOSITORY = "timm/vit_base_patch16_clip_224.openai"
TINY_B16 = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Replace ViT-B-16 by a small model, and return weights for it."""
    import open_clip

    from ovsprune.backbones import open_clip_build

    real = open_clip.get_model_config
    monkeypatch.setattr(
        open_clip,
        "get_model_config",
        lambda name: dict(TINY_B16) if name == "ViT-B-16" else real(name),
    )
    open_clip_build.names_of.cache_clear()
    torch.manual_seed(1)
    return {k: torch.randn_like(v) * 0.05 for k, v in build_clip(TINY_B16).state_dict().items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Tensor]], Path]:
    """Return a function that stores weights in the layout of the hub's client."""
    root = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(root), raising=False)

    def fill(state: dict[str, Tensor]) -> Path:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = root / ("models--" + REPOSITORY.replace("/", "--"))
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "blobs").mkdir()
        blob = repository / "blobs" / "aa"
        save_file(state, blob)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "open_clip_model.safetensors").symlink_to("../../blobs/aa")
        return root

    return fill


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.usefixtures("no_network")
def test_openai_weights_are_read_from_the_cache_with_quick_gelu(
    shrunk: dict[str, Tensor], cache: Callable[[dict[str, Tensor]], Path]
) -> None:
    cache({k: v.half() for k, v in shrunk.items()})
    backbone = backbones.load_backbone("ViT-B/16")
    assert (backbone.name, backbone.pretrained, backbone.trained) == ("ViT-B-16", "openai", True)
    assert backbone.activation == "quick_gelu"
    block = backbone.tower.get_submodule("transformer.resblocks.0.mlp")
    assert type(block.gelu).__name__ == "QuickGELU"
    state = backbone.tower.state_dict()
    for name, value in state.items():
        assert torch.equal(value, shrunk[f"visual.{name}"].half().float())
    assert torch.equal(backbone.text["logit_scale"], shrunk["logit_scale"].half().float())
    assert backbone.preprocess.mean == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.usefixtures("no_network", "cache")
def test_unreachable_hub_is_reported_at_once() -> None:
    start = time.perf_counter()
    with pytest.raises(WeightsError) as caught:
        backbones.load_backbone("ViT-B/16")
    assert time.perf_counter() - start < 10
    said = str(caught.value)
    for word in ("'openai' of ViT-B-16", "not in the local cache", "cannot be reached"):
        assert word in said
    for way_out in ("--pretrained PATH", "HF_HOME", "--pretrained none"):
        assert way_out in said


@pytest.mark.usefixtures("cache")
def test_silent_hub_is_abandoned_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = []

    def silent(address: tuple[str, int], timeout: float) -> None:
        patience.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(WeightsError, match="timed out"):
        backbones.load_backbone("ViT-B/16")
    assert sum(patience) < 10


@pytest.mark.usefixtures("cache")
def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        backbones.load_backbone("ViT-B/16")


def test_random_weights_are_marked(shrunk: dict[str, Tensor]) -> None:
    backbone = backbones.load_backbone("ViT-B/16", pretrained="none")
    assert (backbone.pretrained, backbone.trained) == (None, False)
    again = backbones.load_backbone("ViT-B/16", pretrained="none")
    one, two = backbone.tower.state_dict(), again.tower.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def openai_form(state: dict[str, Tensor]) -> dict[str, Tensor]:
    extras = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    return {k: v.half() for k, v in state.items()} | {k: torch.tensor(v) for k, v in extras.items()}


@pytest.mark.parametrize("form", ["safetensors", "pt", "wrapped", "openai"])
def test_weights_from_files_in_all_formats(
    shrunk: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    match form:
        case "safetensors":
            save_file(shrunk, path)
        case "pt":
            torch.save(shrunk, path)
        case "wrapped":
            inner = {f"module.{k}": v for k, v in shrunk.items()}
            torch.save({"epoch": 3, "state_dict": inner}, path)
        case "openai":
            torch.save(openai_form(shrunk), path)
    backbone = backbones.load_backbone("ViT-B-16", pretrained=str(path))
    assert backbone.trained
    assert backbone.pretrained == path.name
    assert backbone.activation == "gelu"
    got = backbone.tower.state_dict()["proj"]
    torch.testing.assert_close(got, shrunk["visual.proj"], atol=1e-3, rtol=1e-3)


def test_activation_of_a_file_can_be_given(shrunk: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(shrunk, tmp_path / "w.safetensors")
    backbone = backbones.load_backbone(
        "ViT-B-16", pretrained=str(tmp_path / "w.safetensors"), activation="quick_gelu"
    )
    assert backbone.activation == "quick_gelu"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(
    shrunk: dict[str, Tensor], tmp_path: Path, value: float
) -> None:
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    broken = shrunk[f"visual.{name}"].clone()
    broken[1, 2] = value
    save_file({**shrunk, f"visual.{name}": broken}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=f"{name} holds values that are not finite"):
        backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.safetensors"))


def test_misfit_lists_the_keys_and_shapes(shrunk: dict[str, Tensor], tmp_path: Path) -> None:
    state = dict(shrunk)
    del state["visual.proj"]
    state["visual.extra"] = torch.zeros(1)
    state["visual.conv1.weight"] = torch.zeros(3, 3, 8, 8)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.safetensors"))
    said = str(caught.value)
    assert "1 missing (visual.proj)" in said
    assert "1 unexpected (visual.extra)" in said
    assert "visual.conv1.weight (3, 3, 8, 8) instead of (64, 3, 16, 16)" in said


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files(
    shrunk: dict[str, Tensor], tmp_path: Path, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        backbones.load_backbone("ViT-B-16", pretrained=str(path))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_nothing_is_unpickled(
    shrunk: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.proj": Hostile()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        backbones.load_backbone("ViT-B-16", pretrained="w.pt")
    assert not (tmp_path / "ran").exists()


def test_unknown_tags_list_the_known(shrunk: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match="'opnai' is neither a file nor a tag.*openai"):
        backbones.load_backbone("ViT-B-16", pretrained="opnai")


def test_name_without_default_weights_lists_its_tags() -> None:
    with pytest.raises(WeightsError, match="no default.*laion2b_s32b_b79k"):
        backbones.load_backbone("ViT-H-14")


@pytest.mark.usefixtures("no_network")
def test_activation_that_contradicts_the_tag_is_refused(
    shrunk: dict[str, Tensor], cache: Callable[[dict[str, Tensor]], Path]
) -> None:
    cache(shrunk)
    with pytest.raises(OptionError, match="trained with quick_gelu, not gelu"):
        backbones.load_backbone("ViT-B-16", activation="gelu")


def test_unknown_activations_are_named() -> None:
    with pytest.raises(OptionError, match="--activation 'relu' is unknown"):
        backbones.load_backbone("ViT-B-16", pretrained="none", activation="relu")


def test_unknown_models_name_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'ViT-B-61'.*'ViT-B-16'"):
        backbones.load_backbone("ViT-B-61")


def test_unavailable_device_is_refused(shrunk: dict[str, Tensor]) -> None:
    with pytest.raises(OptionError, match="device 'cuda:7' cannot be used here"):
        backbones.load_backbone("ViT-B-16", pretrained="none", device="cuda:7")


def test_folder_with_a_model_name_does_not_hide_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert backbones.load_backbone("tiny").pretrained == "embedded"
