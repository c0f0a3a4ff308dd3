"""Tests of unstructured checkpoints: reading, writing and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ovsprune.core.errors import CheckpointError, OutputError
from ovsprune.core.records import Costs, Preprocess
from ovsprune.masks import apply_masks, read_masks, read_weights
from ovsprune.masks.directory import is_unstructured, read_unstructured, write_unstructured
from ovsprune.masks.spec import NOTE, MaskedSpec, WeightSpec
from ovsprune.slim.hashing import base_spec
from tests.masks.towers import Tower, random_masks


def parts() -> tuple[MaskedSpec, dict[str, Tensor], dict[str, Tensor]]:
    tower, masks = Tower(), random_masks(Tower())
    base = base_spec("Tower", None, False, tower.state_dict())
    apply_masks(tower, masks)
    spec = MaskedSpec(
        base=base,
        family="tower",
        library="none",
        library_version="1.0",
        architecture={"width": 4},
        activation="relu",
        preprocess=Preprocess((4, 4)),
        weights=tuple(
            WeightSpec(n, tuple(m.shape), m.numel() - int(m.sum())) for n, m in masks.items()
        ),
        excluded=("first.weight",),
        dense=Costs(100, 50),
        nonzero=Costs(60, 30),
        provenance={"method": "imp"},
    )
    state = {f"visual.{k}": v for k, v in tower.state_dict().items()}
    return spec, {**state, "logit_scale": torch.tensor(1.0)}, masks


@pytest.fixture
def written(tmp_path: Path) -> Path:
    spec, tensors, masks = parts()
    return write_unstructured(tmp_path / "imp", spec, tensors, masks, card="a card\n")


def test_read_equals_written(written: Path) -> None:
    spec, tensors, masks = parts()
    found = read_unstructured(written)
    assert replace(found.spec, files={}) == spec
    assert {k: v.tolist() for k, v in found.tensors.items()} == {
        k: v.tolist() for k, v in tensors.items()
    }
    assert set(found.text()) == {"logit_scale"}
    assert {k: v.tolist() for k, v in read_masks(written).items()} == {
        k: v.tolist() for k, v in masks.items()
    }
    assert set(read_weights(written)) == set(Tower().state_dict())
    zeros = sum(int((~m).sum()) for m in masks.values())
    assert found.spec.sparsity == zeros / sum(m.numel() for m in masks.values())
    assert is_unstructured(written) and (written / "README.md").read_text() == "a card\n"


def test_config_states_kind_and_note(written: Path) -> None:
    said = json.loads((written / "config.json").read_text())
    assert (said["format"], said["kind"]) == ("ovsprune-unstructured", "unstructured")
    assert said["note"] == NOTE and "saves storage" in NOTE and "no time" in NOTE
    assert set(said["base"]["tensors"]) == set(Tower().state_dict())
    for weight in said["weights"]:
        count = torch.Size(weight["shape"]).numel()
        assert weight["sparsity"] == weight["zeros"] / count


def test_equal_results_give_equal_files(written: Path) -> None:
    spec, tensors, masks = parts()
    other = write_unstructured(written.parent / "two", spec, tensors, masks, card="a card\n")
    for name in ("config.json", "model.safetensors", "masks.safetensors"):
        assert (written / name).read_bytes() == (other / name).read_bytes()


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        said = json.loads((path / "config.json").read_text())
        for key, value in changes.items():
            said[key] = value(said[key]) if callable(value) else value
        (path / "config.json").write_text(json.dumps(said))

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def append(path: Path) -> None:
    with (path / "masks.safetensors").open("ab") as file:
        file.write(b"\0")


def flip(path: Path) -> None:
    content = bytearray((path / "masks.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "masks.safetensors").write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("config.json"), "has no file config.json"),
        (without("masks.safetensors"), "has no file masks.safetensors"),
        (append, "masks.safetensors has .* bytes"),
        (flip, "masks.safetensors is not the file that was written"),
        (change_config(format="ovsprune-slim"), "so it is not an unstructured checkpoint"),
        (
            change_config(format_version=2),
            "format_version is 2, but this version of ovsprune reads 1",
        ),
        (change_config(kind="structured"), "kind is 'structured'"),
        (change_config(weights=[]), "weights is empty"),
        (change_config(weights=lambda w: [w[0], *w]), "weights is empty or lists a name twice"),
        (change_config(weights=lambda w: w[1:]), "is missing in the config or in the masks"),
        (
            change_config(weights=lambda w: [{**w[0], "zeros": w[0]["zeros"] + 1}, *w[1:]]),
            r"the mask of stem.weight has shape \(4, 3, 2, 2\) and",
        ),
        (
            change_config(weights=lambda w: [{**w[0], "zeros": 10**6}, *w[1:]]),
            r"weights\[0\].zeros is 1000000, expected at most 48",
        ),
        (change_config(weights=lambda w: [{**w[0], "name": "../x"}, *w[1:]]), "name is '../x'"),
        (change_config(files=lambda f: {}), "files does not list model.safetensors"),
        (change_config(architecture=[]), r"architecture is \[\], expected an object"),
        (change_config(excluded="x"), "excluded is 'x', expected an array"),
    ],
)
def test_damaged_checkpoints_are_refused(
    written: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(written)
    with pytest.raises(CheckpointError, match=said):
        read_unstructured(written)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t, m: t.update({"visual.stem.weight": torch.ones(4, 3, 2, 2)}),
            "is not zero",
        ),
        (lambda t, m: t.update({"visual.stem.weight": torch.zeros(3)}), r"has shape \(3,\)"),
        (lambda t, m: t.pop("visual.stem.weight"), "visual.stem.weight is missing"),
        (lambda t, m: t.pop("visual.stem.bias"), "visual.stem.bias is missing"),
        (lambda t, m: m.pop("stem.weight"), "stem.weight is missing in the config or in the masks"),
    ],
)
def test_inconsistent_input_is_not_written(tmp_path: Path, change: Any, said: str) -> None:
    spec, tensors, masks = parts()
    change(tensors, masks)
    with pytest.raises(CheckpointError, match=said):
        write_unstructured(tmp_path / "imp", spec, tensors, masks, card="")
    assert list(tmp_path.iterdir()) == []


def test_overwrite(written: Path) -> None:
    spec, tensors, masks = parts()
    with pytest.raises(OutputError, match="exists already"):
        write_unstructured(written, spec, tensors, masks, card="")
    again = write_unstructured(written, spec, tensors, masks, card="new\n", overwrite=True)
    assert (again / "README.md").read_text() == "new\n"
    (written / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="not part of an unstructured result.*mine.txt"):
        write_unstructured(written, spec, tensors, masks, card="", overwrite=True)


def test_other_directories_are_not_overwritten(tmp_path: Path) -> None:
    spec, tensors, masks = parts()
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(OutputError, match="is not overwritten.*ovsprune-unstructured"):
        write_unstructured(tmp_path, spec, tensors, masks, card="", overwrite=True)
    assert not is_unstructured(tmp_path) and not is_unstructured(tmp_path / "missing")


def test_weights_are_a_plain_safetensors_file(written: Path) -> None:
    state = load_file(written / "model.safetensors")
    tower = Tower(3)
    tower.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("visual.")})
    mask = read_masks(written)["stem.weight"]
    assert torch.equal(tower.stem.weight == 0, ~mask)
