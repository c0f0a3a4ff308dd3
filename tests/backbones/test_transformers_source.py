"""Models of transformers by name: folders, the hub's cache, an unreachable hub."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ovsprune
from ovsprune import backbones
from ovsprune.core.errors import OptionError, WeightsError
from ovsprune.core.records import Preprocess
from tests.backbones.hf_models import SIZE, folder_of, make

NAME = "hf:someone/a-small-vit"
OPTIONS = {"samples": 8, "recovery": "closed-form"}


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return folder_of(make("CLIPModel"), tmp_path / "small-clip")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def put(root: Path, folder: Path) -> None:
    """Store the files of a folder in the layout of the hub's client."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = root / "models--someone--a-small-vit"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


def add_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single letters to ``tokenizer.json``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {x: i + 4 for i, x in enumerate("abcdefghijklmnopqrstuvwxyz")}
    words = {"<u>": 0, "<p>": 1, "<s>": 2, "</s>": 3, **letters}
    plain = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<p>", bos_token="<s>", eos_token="</s>", unk_token="<u>"
    )
    fast.save_pretrained(folder)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_model_with_a_text_tower(name: str, tmp_path: Path, images: Tensor) -> None:
    model: Any = make(name)
    folder = folder_of(model, tmp_path / "both")
    add_tokenizer(folder)
    loaded = backbones.load_backbone(f"hf:{folder}")
    assert torch.equal(loaded.tower(images), model.get_image_features(images).pooler_output)
    state = model.state_dict()
    assert {"logit_scale"} < set(loaded.text)
    assert all(torch.equal(v, state[k]) for k, v in loaded.text.items())
    vision = ("vision_model.", "visual_projection.")
    assert set(loaded.text) == {k for k in state if not k.startswith(vision)}

    tokens = torch.tensor([[6, 4, 23] + [1] * 9])  # "cat", padded
    features = model.get_text_features(tokens, attention_mask=(tokens != 1).long()).pooler_output
    expected = torch.nn.functional.normalize(features, dim=1)
    torch.testing.assert_close(loaded.encode_text(["cat"]), expected)
    assert loaded.pooled(images).shape[1] == expected.shape[1]


def test_text_tower_is_kept_in_the_checkpoint(clip: Path, tmp_path: Path, images: Tensor) -> None:
    done = ovsprune.prune(f"hf:{clip}", 0.4, output=tmp_path / "slim", **OPTIONS)
    assert done.spec.base.model == "small-clip"
    text = ovsprune.read(tmp_path / "slim").text()
    state = make("CLIPModel").state_dict()
    assert text and all(torch.equal(v, state[k]) for k, v in text.items())
    again = backbones.load_backbone(str(tmp_path / "slim"))
    assert set(again.text) == set(text) and not again.has_text  # its tokenizer is not there
    assert torch.equal(again.dense(images), ovsprune.load(tmp_path / "slim").dense(images))
    clip_model: Any = make("CLIPModel")  # which has the names of its own vision tower
    ovsprune.apply(clip_model, ovsprune.read(tmp_path / "slim"))
    slim = clip_model.get_image_features(images).pooler_output
    torch.testing.assert_close(slim, again.pooled(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["SiglipVisionModel", "Dinov2Model"])
def test_default_prune_by_name(name: str, tmp_path: Path, images: Tensor) -> None:
    """Use the default criterion, allocation and recovery with eight procedural images."""
    folder = folder_of(make(name), tmp_path / "mine")
    done = ovsprune.prune(f"hf:{folder}", 0.4, samples=8, output=tmp_path / "slim")
    plain = ovsprune.prune(f"hf:{folder}", 0.4, samples=8, recovery="none", dry_run=True)
    assert abs(done.achieved - 0.4) <= 0.01
    assert done.fidelity.relative_error < plain.fidelity.relative_error
    loaded = ovsprune.load(tmp_path / "slim")
    assert torch.equal(loaded.dense(images), done.tower.outputs(images)[1])
    if name == "SiglipVisionModel":
        assert done.spec.layer("head.mlp").kept < done.spec.layer("head.mlp").units


def test_plain_folder_is_a_model_not_a_checkpoint(clip: Path, tmp_path: Path) -> None:
    assert backbones.load_backbone(str(clip)).family == "transformers-vit"
    assert backbones.canonical(str(clip)) == backbones.canonical(f"hf:{clip}") == "small-clip"
    done = ovsprune.prune(str(clip), 0.4, output=tmp_path / "slim", text=False, **OPTIONS)
    assert "--model small-clip --ratio 0.4" in done.spec.provenance["command"]
    assert "--pretrained" not in done.spec.provenance["command"]
    assert backbones.load_backbone(str(tmp_path / "slim")).slim is not None


def test_architectures_select_the_class_with_projection(tmp_path: Path, images: Tensor) -> None:
    model: Any = make("CLIPVisionModelWithProjection")
    loaded = backbones.load_backbone(str(folder_of(model, tmp_path / "a")))
    assert loaded.architecture["class"] == "CLIPVisionModelWithProjection"
    assert torch.equal(loaded.tower(images), model(images).image_embeds)


def test_configuration_without_weights_needs_pretrained_none(tmp_path: Path) -> None:
    folder = folder_of(make("SiglipModel"), tmp_path / "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors.*--pretrained none"):
        backbones.load_backbone(f"hf:{folder}")
    one, two = (backbones.load_backbone(f"hf:{folder}", pretrained="none") for _ in range(2))
    assert (one.pretrained, one.trained, one.text) == (None, False, {})
    other = two.tower.state_dict()
    assert all(torch.equal(v, other[k]) for k, v in one.tower.state_dict().items())
    done = ovsprune.prune(f"hf:{folder}", 0.4, pretrained="none", dry_run=True, **OPTIONS)
    assert not done.spec.base.trained


def test_weights_from_a_file(tmp_path: Path) -> None:
    """Test names of older versions of the library, too."""
    model = make("Dinov2Model", seed=3)
    folder = folder_of(make("Dinov2Model"), tmp_path / "a")
    old = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    state = {}
    for key, value in model.state_dict().items():
        for new, name in {**old, "o_proj": "output.dense"}.items():
            key = key.replace(f"attention.{new}", f"attention.{name}")
        state[f"dinov2.{key}"] = value.clone()
    state["classifier.weight"] = torch.zeros(3, 64)
    save_file(state, tmp_path / "w.safetensors")
    loaded = backbones.load_backbone(f"hf:{folder}", pretrained=str(tmp_path / "w.safetensors"))
    assert (loaded.pretrained, loaded.trained) == ("w.safetensors", True)
    own = loaded.tower.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())


def test_half_precision_in_several_files(tmp_path: Path) -> None:
    model: Any = make("CLIPVisionModel").half()
    model.save_pretrained(tmp_path / "a", max_shard_size="20kB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    own = backbones.load_backbone(f"hf:{tmp_path / 'a'}").tower.state_dict()
    assert all(torch.equal(v.float(), own[k]) for k, v in model.state_dict().items())
    assert {v.dtype for v in own.values()} == {torch.float32}
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(WeightsError, match="lists no files of weights in its folder"):
        backbones.load_backbone(f"hf:{tmp_path / 'a'}")


def test_weights_that_do_not_fit(clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = load_file(clip / "model.safetensors")
    del state["visual_projection.weight"]
    state["more"] = torch.zeros(1)
    state["vision_model.post_layernorm.weight"] = torch.zeros(3)
    save_file(state, clip / "model.safetensors")
    capfd.readouterr()
    with pytest.raises(WeightsError) as caught:
        backbones.load_backbone(f"hf:{clip}")
    said = str(caught.value)
    assert "does not fit small-clip, a CLIPModel" in said
    assert "1 missing (visual_projection.weight)" in said
    assert "1 unexpected (more)" in said
    assert "vision_model.post_layernorm.weight (3,) instead of (32,)" in said
    assert capfd.readouterr() == ("", "")  # and the library says nothing


def test_pickled_weights_are_not_opened(clip: Path) -> None:
    state = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    torch.save(state, clip / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pickled weights are not opened"):
        backbones.load_backbone(f"hf:{clip}")


def test_preprocessing_of_the_configuration_is_used(tmp_path: Path) -> None:
    clip = folder_of(make("CLIPVisionModel"), tmp_path / "clip")
    siglip = folder_of(make("SiglipVisionModel"), tmp_path / "siglip")
    naflex = folder_of(make("Siglip2VisionModel"), tmp_path / "naflex")
    half = (0.5, 0.5, 0.5)
    for folder, expected in (
        (clip, Preprocess((SIZE, SIZE))),
        (siglip, Preprocess((SIZE, SIZE), half, half, "bicubic", "squash")),
        (naflex, Preprocess((SIZE, SIZE), half, half, "bilinear", "squash")),
    ):
        assert backbones.load_backbone(f"hf:{folder}").preprocess == expected
    said = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1, 1, 2],
        "resample": 2,
        "size": {"height": SIZE, "width": SIZE},
    }
    (clip / "preprocessor_config.json").write_text(json.dumps(said))
    assert backbones.load_backbone(f"hf:{clip}").preprocess == Preprocess(
        (SIZE, SIZE), (0.1, 0.2, 0.3), (1.0, 1.0, 2.0), "bilinear", "squash"
    )
    (clip / "preprocessor_config.json").write_text(json.dumps({**said, "resample": 1}))
    with pytest.raises(WeightsError, match="is no configuration of the preprocessing"):
        backbones.load_backbone(f"hf:{clip}")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "bert"}, "a model of the type 'bert'; those that can be pruned are clip"),
        ({"model_type": "dinov2", "hidden_act": "nothing"}, "cannot build this Dinov2Model"),
        ({"model_type": "dinov2", "hidden_size": "wide"}, "cannot build this Dinov2Model"),
        ({"model_type": "dinov2", "hidden_act": "tanh"}, "has the activation 'tanh'; known are"),
        ({"model_type": "siglip_vision_model", "vision_use_head": False}, "has no attention pool"),
    ],
)
def test_configurations_that_are_refused(
    config: dict[str, Any], match: str, tmp_path: Path
) -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**small, **config}))
    with pytest.raises(WeightsError, match=match):
        backbones.load_backbone(str(tmp_path), pretrained="none")


def test_invalid_names_and_options(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(WeightsError, match="neither a folder nor the name of a repository"):
        backbones.load_backbone("hf:a/b/c")
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        backbones.load_backbone(f"hf:{tmp_path}")
    with pytest.raises(WeightsError, match="--pretrained 'openai' is no file"):
        backbones.load_backbone(f"hf:{clip}", pretrained="openai")
    with pytest.raises(OptionError, match="--activation 'gelu': .* has quick_gelu; leave it out"):
        backbones.load_backbone(f"hf:{clip}", activation="gelu")
    (clip / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="holds list, expected an object"):
        backbones.load_backbone(f"hf:{clip}")


def test_a_repository_in_the_cache(root: Path, clip: Path, tmp_path: Path, images: Tensor) -> None:
    add_tokenizer(clip)
    put(root, clip)
    loaded = backbones.load_backbone(NAME)
    assert (loaded.name, loaded.pretrained, loaded.trained) == (NAME, "hub", True)
    assert loaded.has_text
    model: Any = make("CLIPModel")
    assert torch.equal(loaded.pooled(images), backbones.load_backbone(str(clip)).pooled(images))
    assert backbones.canonical(NAME) == "a-small-vit"
    done = ovsprune.prune(NAME, 0.4, output=tmp_path / "slim", **OPTIONS)
    assert f"--model {NAME} --ratio 0.4" in done.spec.provenance["command"]
    assert "--pretrained" not in done.spec.provenance["command"]
    again = backbones.load_backbone(str(tmp_path / "slim"))
    expected = model.get_text_features(
        torch.tensor([[4] + [1] * 11]), attention_mask=torch.tensor([[1] + [0] * 11])
    ).pooler_output
    torch.testing.assert_close(
        again.encode_text(["a"]), torch.nn.functional.normalize(expected, dim=1)
    )


@pytest.mark.usefixtures("root")
def test_unreachable_hub_is_reported_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    with pytest.raises(WeightsError) as caught:
        backbones.load_backbone(NAME)
    assert time.perf_counter() - start < 10
    said = str(caught.value)
    for word in (NAME, "not in the local cache", "cannot be reached", "Network is unreachable"):
        assert word in said
    for way_out in ("--model hf:FOLDER", "HF_HOME", "--pretrained none"):
        assert way_out in said
    assert capfd.readouterr() == ("", "")


def test_silent_hub_is_abandoned_after_the_timeout(
    root: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test the case that only optional files are missing from the cache, too."""
    patience = []

    def silent(address: tuple[str, int], timeout: float) -> None:
        patience.append(timeout)
        raise TimeoutError("timed out")

    put(root, clip)
    monkeypatch.setattr(socket, "create_connection", silent)
    assert not backbones.load_backbone(NAME).has_text
    assert 0 < sum(patience) < 10
