"""Weights from files of many formats: wrappers, prefixes, precisions, misfits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ovsprune import backbones
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.backbones.recognise import recognise
from ovsprune.backbones.state_file import open_state
from ovsprune.core.errors import WeightsError
from ovsprune.jobs.prune import prune
from ovsprune.slim.hashing import state_hashes
from tests.backbones.test_pretrained import TINY_B16

State = dict[str, Tensor]
EXTRAS = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}


@pytest.fixture(autouse=True)
def _shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace ViT-B-16 and a variant of it by small models."""
    import open_clip

    from ovsprune.backbones import open_clip_build, recognise

    real = open_clip.get_model_config
    small = {
        "ViT-B-16": TINY_B16,
        "ViT-B-16-quickgelu": {**TINY_B16, "quick_gelu": True},
    }
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda name: deepcopy(small.get(name) or real(name))
    )
    open_clip_build.names_of.cache_clear()
    recognise._known.cache_clear()


@pytest.fixture
def clip() -> State:
    torch.manual_seed(1)
    return {k: torch.randn_like(v) * 0.05 for k, v in build_clip(TINY_B16).state_dict().items()}


def tower_of(clip: State) -> State:
    return {k.removeprefix("visual."): v for k, v in clip.items() if k.startswith("visual.")}


def separate_qkv(clip: State) -> State:
    """Convert to the format of CAT-Seg: separate weights of q, k and v, one fused bias."""
    found = {}
    for name, value in clip.items():
        if name.endswith("in_proj_weight"):
            stem = name.removesuffix("in_proj_weight")
            found |= {
                f"{stem}{w}_proj_weight": x.clone()
                for w, x in zip("qkv", value.chunk(3), strict=True)
            }
        else:
            found[name] = value
    return found


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


CATSEG = "sem_seg_head.predictor.clip_model."
WHOLE: dict[str, Callable[[State], Any]] = {
    "as open_clip has it": dict,
    "of data-parallel training": lambda s: {"epoch": 3, "state_dict": prefixed("module.", s)},
    "of lightning": lambda s: {"state_dict": prefixed("model.", s), "optimizer_states": [{}]},
    "of detectron2": lambda s: {"model": prefixed("backbone.clip_model.", s), "iteration": 7},
    "nested twice": lambda s: {"model": {"state_dict": s}, "ema": {"decay": torch.ones(1)}},
    "CAT-Seg": lambda s: {
        "model": {**prefixed(CATSEG, separate_qkv(s)), "sem_seg_head.up.weight": torch.ones(3, 3)}
    },
    "OpenAI": lambda s: {**s, **{k: torch.tensor(v) for k, v in EXTRAS.items()}},
}
TOWER: dict[str, Callable[[State], Any]] = {
    "visual": lambda t: prefixed("visual.", t),
    "bare": dict,
    "bare, apart": separate_qkv,
    "of a framework": lambda t: prefixed("backbone.", t) | {"head.weight": torch.ones(2, 2)},
    "visual, of a framework": lambda t: prefixed("net.visual.", t) | {"net.head": torch.ones(2)},
    "visual with a temperature": lambda t: prefixed("visual.", t) | {"logit_scale": torch.ones([])},
}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("form", WHOLE)
def test_clip_loads_from_all_formats(clip: State, tmp_path: Path, form: str, half: bool) -> None:
    if half:
        clip = {k: v.half() for k, v in clip.items()}
    torch.save(WHOLE[form](clip), tmp_path / "w.pt")
    backbone = backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.pt"))
    tower = backbone.tower.state_dict()
    assert tower.keys() == tower_of(clip).keys()
    assert all(torch.equal(tower[k], v.float()) for k, v in tower_of(clip).items())
    text = {k: v for k, v in clip.items() if not k.startswith("visual.")}
    assert all(torch.equal(backbone.text[k], v.float()) for k, v in text.items())
    assert backbone.has_text
    assert (backbone.pretrained, backbone.trained) == ("w.pt", True)


@pytest.mark.parametrize("form", TOWER)
def test_image_tower_loads_from_all_formats(clip: State, tmp_path: Path, form: str) -> None:
    torch.save(TOWER[form](tower_of(clip)), tmp_path / "w.pt")
    backbone = backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.pt"))
    tower = backbone.tower.state_dict()
    assert all(torch.equal(tower[k], v) for k, v in tower_of(clip).items())
    assert not backbone.has_text and not backbone.text


@pytest.mark.parametrize("form", ["of detectron2", "CAT-Seg", "visual", "bare, apart"])
def test_base_hashes_match_the_file(clip: State, tmp_path: Path, form: str) -> None:
    make = WHOLE.get(form) or (lambda state: TOWER[form](tower_of(state)))
    torch.save(make(clip), tmp_path / "w.pt")
    done = prune("ViT-B-16", 0.3, pretrained=str(tmp_path / "w.pt"), dry_run=True, samples=2,
                 criterion="magnitude", allocation="uniform", recovery="none")  # fmt: skip
    base = done.spec.base
    assert base.tensors == state_hashes(tower_of(clip))
    assert (base.model, base.pretrained, base.trained) == ("ViT-B-16", "w.pt", True)


def test_ignored_tensors_are_noted(clip: State, tmp_path: Path) -> None:
    torch.save(WHOLE["CAT-Seg"](clip), tmp_path / "w.pt")
    backbone = backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.pt"))
    assert backbone.notes == (
        f"w.pt: the image tower lies under '{CATSEG}visual.'; tensors outside of the "
        "model are ignored (1)",
    )


def test_incomplete_text_tower_of_a_framework_is_ignored(clip: State, tmp_path: Path) -> None:
    clip.pop("ln_final.weight")
    torch.save(WHOLE["of detectron2"](clip), tmp_path / "w.pt")
    backbone = backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.pt"))
    assert not backbone.has_text
    assert backbone.notes == (
        "w.pt has no complete text tower under 'backbone.clip_model.': only the image tower is "
        "loaded",
    )


def test_two_different_towers_in_one_file_are_refused(clip: State, tmp_path: Path) -> None:
    twice = prefixed("student.", clip) | prefixed("teacher.", clip)
    torch.save(twice, tmp_path / "w.pt")
    assert backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.pt")).trained
    twice["teacher.visual.proj"] = twice["teacher.visual.proj"] + 1
    torch.save(twice, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"two such towers .*'student\.visual\.' and 'teacher"):
        backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.pt"))


def test_settings_of_a_training_run_are_not_imported(clip: State, tmp_path: Path) -> None:
    """Read a file that ``torch.load`` refuses, with the reader that runs no code."""
    torch.save({"model": clip, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    with pytest.raises(Exception, match="argparse"):
        torch.load(tmp_path / "w.pth", weights_only=True)
    backbone = backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.pth"))
    assert torch.equal(backbone.tower.state_dict()["proj"], clip["visual.proj"])


class Release(nn.Module):
    """Model in the format of OpenAI's archives: a CLIP, three numbers and a mask as buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, value in model.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(value))
        for name, number in EXTRAS.items():
            self.register_buffer(name, torch.tensor(number))
        self.register_buffer("attn_mask", torch.zeros(2, 2))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.visual(images)
        return out


@pytest.mark.filterwarnings(
    "ignore:.*jit", "ignore:.*TorchScript", "ignore::torch.jit.TracerWarning"
)
def test_archive_in_the_format_of_openai(clip: State, tmp_path: Path) -> None:
    model = build_clip(TINY_B16)
    model.load_state_dict(clip)
    archive = torch.jit.trace(Release(model).half().float(), torch.ones(1, 3, 32, 32))
    torch.jit.save(archive, tmp_path / "ViT-B-16.pt")
    assert open_state(tmp_path / "ViT-B-16.pt").openai
    backbone = backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "ViT-B-16.pt"))
    tower = backbone.tower.state_dict()
    assert all(torch.equal(tower[k], v.half().float()) for k, v in tower_of(clip).items())
    assert backbone.has_text and backbone.activation == "gelu"
    (note,) = backbone.notes
    assert "looks like a release of OpenAI's" in note and "--activation quick_gelu" in note
    for name, activation in (("ViT-B-16", "quick_gelu"), ("ViT-B-16-quickgelu", None)):
        with_option = backbones.load_backbone(
            name, pretrained=str(tmp_path / "ViT-B-16.pt"), activation=activation
        )
        assert with_option.activation == "quick_gelu" and not with_option.notes


@pytest.mark.parametrize("held", [{}, {"epoch": 3}, [1, 2], {"a": {"b": {"c": {"d": 1}}}}])
def test_files_without_tensors(tmp_path: Path, held: Any) -> None:
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="holds no state dict of tensors"):
        backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.pt"))


def on_meta(name: str) -> State:
    """Return a model's state on the meta device."""
    with torch.device("meta"):
        import open_clip

        config = open_clip.get_model_config(name)
        assert config is not None
        state = {k: torch.empty_like(v) for k, v in build_clip(config).state_dict().items()}
    return {k: v.half() for k, v in state.items()}


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("ViT-B-32", ("ViT-B-32", "ViT-B-32-quickgelu")),
        ("ViT-L-14-336", ("ViT-L-14-336", "ViT-L-14-336-quickgelu")),
        ("ViT-H-14-378", ("ViT-H-14-378", "ViT-H-14-378-quickgelu")),
        ("coca_ViT-B-32", ("coca_ViT-B-32",)),
        ("coca_base", ("coca_base",)),
        ("ViT-M-16-alt", ("ViT-M-16-alt",)),
        ("ViT-B-16-plus-240", ("ViT-B-16-plus-240",)),
        ("ViT-L-14-CLIPA", ("ViT-L-14-CLIPA",)),
    ],
)
def test_models_are_recognised_by_their_shapes(name: str, first: tuple[str, ...]) -> None:
    state = on_meta(name)
    assert recognise(state) == first
    assert recognise(prefixed("framework.clip.", state)) == first


@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"])
def test_resnets_are_recognised_by_their_shapes(name: str) -> None:
    state = on_meta(name)
    assert recognise(state) == (name, f"{name}-quickgelu")
    assert recognise(tower_of(state))[:2] == (name, f"{name}-quickgelu")


def test_image_tower_can_match_several_models() -> None:
    names = recognise(tower_of(on_meta("ViT-B-32")))
    assert names[:2] == ("ViT-B-32", "ViT-B-32-quickgelu")
    assert {"roberta-ViT-B-32", "nllb-clip-base", "coca_roberta-ViT-B-32"} < set(names)
    text = {"text.transformer.x.weight": torch.ones(2, 2)}
    own = {"ViT-B-32", "ViT-B-32-quickgelu"}
    assert not own & set(recognise({**prefixed("visual.", tower_of(on_meta("ViT-B-32"))), **text}))


@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.ones(2)},
        {"conv1.weight": torch.ones(8, 3, 4, 4)},
        {"conv1.weight": torch.ones(8, 3, 4, 4), "class_embedding": torch.ones(8)},
    ],
)
def test_other_state_dicts_are_not_recognised(state: State) -> None:
    assert recognise(state) == ()


def test_misfit_names_the_model_that_fits(tmp_path: Path) -> None:
    import open_clip

    config = open_clip.get_model_config("ViT-S-32-alt")
    assert config is not None
    save_file(build_clip(config).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.safetensors"))
    said = str(caught.value)
    assert "unexpected (visual.transformer.resblocks." in said
    assert "of another shape (" in said and "positional_embedding" in said
    assert said.endswith("Its shapes are those of ViT-S-32-alt: give that as --model.")


def test_misfit_of_the_text_tower_only(clip: State, tmp_path: Path) -> None:
    clip["text_projection"] = torch.zeros(7, 7)
    save_file(clip, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        backbones.load_backbone("ViT-B-16", pretrained=str(tmp_path / "w.safetensors"))
    said = str(caught.value)
    assert "1 of another shape (text_projection (7, 7) instead of (32, 32))" in said
    assert said.endswith("Is it another model's file, or one that was changed?")
