"""Tests of mask files, in the format of ovsprune and of torch.nn.utils.prune."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from ovsprune.core.errors import CheckpointError, OptionError, OutputError
from ovsprune.masks import apply_masks, read_masks, read_weights, write_masks
from tests.masks.towers import Tower, random_masks


def pruned_by_torch(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    tower, masks = Tower(seed), random_masks(Tower())
    for name, mask in masks.items():
        layer, _, parameter = name.rpartition(".")
        prune.custom_from_mask(tower.get_submodule(layer), parameter, mask)
    return tower, masks


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {"model": state, "iteration": 5},
        # as OpenTrans saves them
        lambda state: {
            "first_conv": {"weight": torch.ones(2, 2)},
            "backbone": state,
            "sem_seg_head": {"x.weight": torch.ones(2)},
        },
    ],
    ids=["plain", "parallel", "model", "OpenTrans"],
)
def test_state_dicts_of_torch_prune_are_read(tmp_path: Path, wrap: Any) -> None:
    tower, masks = pruned_by_torch()
    torch.save(wrap(tower.state_dict()), tmp_path / "imp.pth")
    assert same(read_masks(tmp_path / "imp.pth"), masks)
    expected = Tower(0)
    apply_masks(expected, masks)
    assert same(read_weights(tmp_path / "imp.pth"), dict(expected.state_dict()))


def test_torch_form_is_loaded_by_torch_prune(tmp_path: Path) -> None:
    masks, weights = random_masks(Tower()), Tower(5)
    file = write_masks(
        tmp_path / "new" / "imp.pth", masks, form="torch", weights=weights.state_dict()
    )
    fresh, _ = pruned_by_torch(9)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert same(read_masks(file), masks)
    images = torch.randn(1, 3, 4, 4)
    apply_masks(weights, masks)
    assert torch.equal(fresh(images), weights(images))
    for module in fresh.modules():
        if prune.is_pruned(module) and hasattr(module, "weight_mask"):
            prune.remove(module, "weight")
    assert same(dict(fresh.state_dict()), read_weights(file))


def test_files_without_weights(tmp_path: Path) -> None:
    masks = random_masks(Tower())
    torch_file = write_masks(tmp_path / "imp.pth", masks, form="torch")
    ours = write_masks(tmp_path / "imp.safetensors", masks)
    for file in (torch_file, ours):
        assert same(read_masks(file), masks)
        with pytest.raises(CheckpointError, match="read it with read_masks"):
            read_weights(file)
    assert set(torch.load(torch_file, weights_only=True)) == {f"{name}_mask" for name in masks}


def test_torch_form_in_a_safetensors_file(tmp_path: Path) -> None:
    tower, masks = pruned_by_torch()
    save_file({k: v.clone() for k, v in tower.state_dict().items()}, tmp_path / "x.safetensors")
    assert same(read_masks(tmp_path / "x.safetensors"), masks)


def test_other_masks_are_ignored(tmp_path: Path) -> None:
    tower, masks = pruned_by_torch()
    torch.save({**tower.state_dict(), "attn_mask": torch.full((2, 2), -1.0)}, tmp_path / "x.pth")
    assert same(read_masks(tmp_path / "x.pth"), masks)
    torch.save({"attn_mask": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="x.pth holds no masks .*layer.weight_mask"):
        read_masks(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a.weight_mask": torch.tensor([0.0, 0.5])}, "a.weight_mask holds values other than 0"),
        ({"a.weight_mask": torch.tensor([float("nan")])}, "holds values other than 0 and 1"),
        (
            {"a.weight_mask": torch.ones(2), "a.weight_orig": torch.ones(3)},
            r"a.weight_mask has shape \(2,\), but a.weight_orig has \(3,\)",
        ),
        (Tower().state_dict(), "holds no masks"),
    ],
)
def test_invalid_state_dicts_are_refused(
    tmp_path: Path, state: dict[str, Tensor], said: str
) -> None:
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=f"bad.pth.*{said}"):
        read_masks(tmp_path / "bad.pth")


class _Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path.cwd() / "owned"),)


def test_files_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tower, masks = pruned_by_torch()
    torch.save({"backbone": tower.state_dict(), "hook": _Hostile()}, tmp_path / "x.pth")
    assert same(read_masks(tmp_path / "x.pth"), masks)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(_Hostile()))
    with pytest.raises(CheckpointError, match="bare.pth"):
        read_masks(tmp_path / "bare.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors", "junk.pth", "empty"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "junk.pth").write_bytes(b"junk" * 100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=name):
        read_masks(tmp_path / name)


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    masks = random_masks(Tower())
    for wrong, said in (
        ({"form": "numpy"}, "form 'numpy' is unknown; known forms: ovsprune, torch"),
        ({}, "x.pth has the wrong suffix: a file of the form 'ovsprune' ends in .safetensors"),
    ):
        with pytest.raises(OptionError, match=said):
            write_masks(tmp_path / "x.pth", masks, **wrong)
    with pytest.raises(OptionError, match="leave weights out"):
        write_masks(tmp_path / "x.safetensors", masks, weights={})
    with pytest.raises(OptionError, match="no masks to write"):
        write_masks(tmp_path / "x.safetensors", {})
    with pytest.raises(CheckpointError, match=r"stem.weight .* weights is missing"):
        write_masks(tmp_path / "x.pth", masks, form="torch", weights={})
    with pytest.raises(CheckpointError, match=r"stem.weight .* weights has shape \(1,\)"):
        weights = {**Tower().state_dict(), "stem.weight": torch.ones(1)}
        write_masks(tmp_path / "x.pth", masks, form="torch", weights=weights)
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_refused(tmp_path: Path) -> None:
    file = write_masks(tmp_path / "x.safetensors", random_masks(Tower()))
    with pytest.raises(OutputError, match="exists already"):
        write_masks(file, random_masks(Tower(), 1))
    write_masks(file, random_masks(Tower(), 1), overwrite=True)
    assert same(read_masks(file), random_masks(Tower(), 1))
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        write_masks(tmp_path / "d.safetensors", random_masks(Tower()), overwrite=True)


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_masks(tmp_path / "x.pth", random_masks(Tower()), form="torch")
    before = file.read_bytes()

    def full(_: object, place: Path) -> None:
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="x.pth could not be written: .*No space left"):
        write_masks(file, random_masks(Tower(), 1), form="torch", overwrite=True)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
