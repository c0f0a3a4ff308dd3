"""Models and weights with the prefix ``hf-hub:``: from the cache, or unreachable."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ovsprune import backbones
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.core.errors import OptionError, WeightsError
from ovsprune.jobs.benchmark import benchmark
from ovsprune.jobs.prune import prune
from tests.contracts.conftest import LITE, open_clip_efficientnet, open_clip_vit

NAME = "hf-hub:someone/a-small-clip"


def put(root: Path, files: dict[str, Any]) -> None:
    """Store files in the layout of the hub's client."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = root / "models--someone--a-small-clip"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for name, content in files.items():
        blob = repository / "blobs" / f"of-{name}"
        if name.endswith(".json"):
            blob.write_text(json.dumps(content))
        elif name.endswith(".bin"):
            torch.save(content, blob)
        else:
            save_file(content, blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")


@pytest.fixture
def config() -> dict[str, Any]:
    return {
        "model_cfg": dict(open_clip_vit().architecture),
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash"},
    }


@pytest.fixture
def state(config: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model = build_clip(config["model_cfg"])
    return {k: torch.randn_like(v) * 0.05 for k, v in model.state_dict().items()}


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_repository_is_a_model(root: Path, config: Any, state: Any, file: str) -> None:
    put(root, {"open_clip_config.json": config, file: state})
    backbone = backbones.load_backbone(NAME)
    assert (backbone.name, backbone.pretrained, backbone.trained) == (NAME, "hub", True)
    assert backbone.activation == "quick_gelu" and backbone.has_text
    assert backbone.preprocess.resize_mode == "squash"
    tower = backbone.tower.state_dict()
    assert all(torch.equal(v, state[f"visual.{k}"]) for k, v in tower.items())
    with pytest.raises(OptionError, match="'hub' of hf-hub:someone.* with quick_gelu, not gelu"):
        backbones.load_backbone(NAME, activation="gelu")


def test_pruned_repository_keeps_its_name(
    root: Path, config: Any, state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, {"open_clip_config.json": config, "open_clip_model.safetensors": state})
    monkeypatch.chdir(tmp_path)
    done = prune(NAME, 0.4, samples=2, criterion="magnitude", allocation="uniform", recovery="none")
    assert done.path == tmp_path / "slim" / "a-small-clip-r0.4"
    assert done.spec.base.model == NAME
    command = done.spec.provenance["command"]
    assert command.startswith(f"ovsprune prune --model {NAME} --ratio 0.4 --samples 2")
    rows = benchmark(str(done.path), pairs=2, batch_sizes=(1,), memory=False)["rows"]
    assert [row["name"] for row in rows] == [f"{NAME} dense", f"{NAME} slim"]


def test_repository_as_source_of_weights(root: Path, config: Any, state: Any) -> None:
    put(root, {"open_clip_config.json": config, "open_clip_model.safetensors": state})
    with pytest.raises(WeightsError, match=r"open_clip_model\.safetensors does not fit ViT-B-32"):
        backbones.load_backbone("ViT-B-32", pretrained=NAME)
    random = backbones.load_backbone(NAME, pretrained="none")
    assert (random.pretrained, random.trained) == (None, False)


def test_activation_of_a_repository_is_used(
    root: Path, config: Any, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    from ovsprune.backbones import open_clip_build

    own = {**config["model_cfg"], "quick_gelu": False}
    real = open_clip.get_model_config
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda name: dict(own) if name == "ViT-S-32" else real(name)
    )
    open_clip_build.names_of.cache_clear()
    put(root, {"open_clip_config.json": config, "open_clip_model.safetensors": state})
    backbone = backbones.load_backbone("ViT-S-32", pretrained=NAME)
    assert (backbone.name, backbone.pretrained) == ("ViT-S-32", NAME)
    assert backbone.activation == "quick_gelu"
    assert backbone.preprocess.mean == (0.5, 0.5, 0.5)


def test_convolutional_tower_in_a_repository(root: Path) -> None:
    tower = open_clip_efficientnet().tower.state_dict()
    put(root, {
        "open_clip_config.json": {"model_cfg": LITE},
        "open_clip_model.safetensors": {f"visual.{k}": v for k, v in tower.items()},
    })  # fmt: skip
    backbone = backbones.load_backbone(NAME)
    assert (backbone.family, backbone.pretrained) == ("open_clip-efficientnet", "hub")
    assert all(torch.equal(v, tower[k]) for k, v in backbone.tower.state_dict().items())


@pytest.mark.usefixtures("root")
def test_unreachable_hub_is_reported_at_once() -> None:
    start = time.perf_counter()
    with pytest.raises(WeightsError) as caught:
        backbones.load_backbone(NAME)
    assert time.perf_counter() - start < 10
    message = str(caught.value)
    for word in (NAME, "not in the local cache", "cannot be reached", "HF_HOME", "--pretrained"):
        assert word in message


def test_weights_missing_from_the_cache(root: Path, config: Any) -> None:
    put(root, {"open_clip_config.json": config})
    with pytest.raises(WeightsError, match=f"the weights of {NAME} are not in the local cache"):
        backbones.load_backbone(NAME)
    assert not backbones.load_backbone(NAME, pretrained="none").trained


@pytest.mark.usefixtures("root")
def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        backbones.load_backbone(NAME)


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:clip", "hf-hub:a/b/c", "hf-hub:/a"])
def test_malformed_repository_names(name: str) -> None:
    with pytest.raises(WeightsError, match="names no repository of the hub; write hf-hub:ORG/"):
        backbones.load_backbone(name)


def test_repository_in_another_format(root: Path, config: Any) -> None:
    put(root, {"open_clip_config.json": {"architecture": "vit"}})
    with pytest.raises(WeightsError, match="no configuration of open_clip's"):
        backbones.load_backbone(NAME)


def test_repository_without_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def lacks(repository: str, name: str) -> str:
        asked.append((repository, name))
        raise EntryNotFoundError("404")

    monkeypatch.setattr("ovsprune.backbones.hub.check_reachable", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lacks)
    with pytest.raises(
        WeightsError, match=r"someone/a-small-clip on the hub has none of open_clip_"
    ):
        backbones.load_backbone(NAME)
    assert asked == [("someone/a-small-clip", "open_clip_config.json")]


def test_connection_lost_during_the_download(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(repository: str, name: str) -> str:
        raise ConnectionError("reset by peer\nand more")

    monkeypatch.setattr("ovsprune.backbones.hub.check_reachable", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(WeightsError, match=r"cannot be reached \(reset by peer\)"):
        backbones.load_backbone(NAME)
