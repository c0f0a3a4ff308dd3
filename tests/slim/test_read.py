from __future__ import annotations

import hashlib
import importlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.read import read, read_spec


@pytest.fixture
def directory(make_tower: Callable[[], nn.Module], write_slim: Callable[..., Path]) -> Path:
    return write_slim(make_tower())


def relist(directory: Path) -> None:
    """List the files as they are now in the config, as an attacker would."""
    config = json.loads((directory / "config.json").read_text())
    for name in config["files"]:
        content = (directory / name).read_bytes()
        config["files"][name] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
    (directory / "config.json").write_text(json.dumps(config))


def test_read_equals_written_bit_for_bit(
    directory: Path, make_tower: Callable[[], nn.Module]
) -> None:
    checkpoint = read(directory)
    assert checkpoint.path == directory
    assert checkpoint.spec == read_spec(directory)
    dense = make_tower().state_dict()
    tower = checkpoint.tower()
    assert tower.keys() == dense.keys()
    assert torch.equal(tower["proj"], dense["proj"])
    fc = "transformer.resblocks.1.mlp.c_fc.weight"
    assert torch.equal(tower[fc], dense[fc][checkpoint.mask["transformer.resblocks.1.mlp"]])
    assert checkpoint.text() == {}
    assert checkpoint.mask["transformer.resblocks.0.attn"].tolist() == [0, 2]


def test_string_paths_and_linked_files(directory: Path, tmp_path: Path) -> None:
    """Read the cache of a hub, which consists of links."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in directory.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert read(str(snapshot)).spec == read(directory).spec


def test_other_files_are_ignored(directory: Path) -> None:
    (directory / "notes.txt").write_text("mine")
    (directory / "README.md").unlink()
    assert read(directory).spec.activation == "quick_gelu"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "mask.safetensors"])
def test_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no file {name}.*copy the whole directory"):
        read(directory)


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; name the directory"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file; name the directory"):
        read(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no file model\.safetensors"):
        read(directory)


def test_truncated_file_is_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, the config says"):
        read(directory)


def test_changed_byte_is_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not the file that was written"):
        read(directory)
    assert read(directory, verify=False).spec.family == "open_clip-vit"


def test_large_config_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("ovsprune.slim.read"), "_LARGEST_CONFIG", 100)
    with pytest.raises(CheckpointError, match="expected at most 100; it is no config"):
        read(directory)


def test_unlisted_files_are_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config["files"]["model.safetensors"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"files does not list model\.safetensors"):
        read(directory)


def header(length: int, text: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + body


ENTRY = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HOSTILE_FILES = {
    "empty": b"",
    "no header": b"\x01\x02",
    "header longer than the file": header(2**40, ENTRY),
    "header longer than anything": header(2**64 - 1, ENTRY),
    "header cut short": header(len(ENTRY) - 5, ENTRY, bytes(4)),
    "data cut short": header(len(ENTRY), ENTRY, bytes(2)),
    "more data than listed": header(len(ENTRY), ENTRY, bytes(9)),
    "offsets outside": header(len(ENTRY) + 1, ENTRY.replace(b"[0,4]", b"[8,12]") + b" ", bytes(4)),
    "a shape that overflows": header(
        len(ENTRY) + 38,
        ENTRY.replace(b"[1]", b"[9999999999999999999,9999999999999999999]"),
        bytes(4),
    ),
    "unknown type": header(len(ENTRY), ENTRY.replace(b"F32", b"F33"), bytes(4)),
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94.",
    "a zip": b"PK\x03\x04" + bytes(40),
}


@pytest.mark.parametrize("file", ["model.safetensors", "mask.safetensors"])
@pytest.mark.parametrize("content", HOSTILE_FILES.values(), ids=HOSTILE_FILES.keys())
def test_invalid_safetensors_files_are_refused(directory: Path, content: bytes, file: str) -> None:
    (directory / file).write_bytes(content)
    relist(directory)
    with pytest.raises(CheckpointError, match=f"{file} is no valid safetensors file .*copy it"):
        read(directory)


HEADS = "transformer.resblocks.0.attn"
Mask = dict[str, Tensor]
BAD_MASKS: dict[str, tuple[Callable[[Mask], Any], str]] = {
    "float": (lambda m: m.update({HEADS: m[HEADS].float()}), r"is torch.float32 \(2,\), expected"),
    "int32": (
        lambda m: m.update({HEADS: m[HEADS].int()}),
        r"is torch.int32 \(2,\), expected int64",
    ),
    "bool mask": (lambda m: m.update({HEADS: torch.ones(4).bool()}), "is torch.bool"),
    "two axes": (lambda m: m.update({HEADS: m[HEADS][None]}), r"is torch.int64 \(1, 2\)"),
    "too many": (lambda m: m.update({HEADS: torch.arange(3)}), "keeps 3 units, the config says 2"),
    "none": (lambda m: m.update({HEADS: torch.arange(0)}), "keeps 0 units, the config says 2"),
    "beyond": (lambda m: m.update({HEADS: torch.tensor([1, 4])}), r"from 1 to 4, .* \[0, 4\)"),
    "negative": (lambda m: m.update({HEADS: torch.tensor([-1, 2])}), "from -1 to 2"),
    "unsorted": (lambda m: m.update({HEADS: torch.tensor([2, 0])}), "not strictly ascending"),
    "twice": (lambda m: m.update({HEADS: torch.tensor([2, 2])}), "not strictly ascending"),
    "missing": (lambda m: m.pop(HEADS), f"lacks layers {HEADS}"),
    "unknown": (lambda m: m.update({"../x": torch.arange(2)}), r"has unknown layers \.\./x"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_invalid_masks_are_refused(directory: Path, name: str) -> None:
    change, message = BAD_MASKS[name]
    mask = load_file(directory / "mask.safetensors")
    change(mask)
    save_file(mask, directory / "mask.safetensors")
    relist(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(directory)
    assert "mask.safetensors" in str(caught.value)


FC = "visual.transformer.resblocks.0.mlp.c_fc.weight"
IN_PROJ = "visual.transformer.resblocks.0.attn.in_proj_weight"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no tower": (
        lambda t: [t.pop(k) for k in list(t)] and t.update(a=torch.ones(1)),
        "no tensor o",
    ),
    "missing": (lambda t: t.pop(FC), f"lacks the tensor {FC}"),
    "narrow MLP": (lambda t: t.update({FC: t[FC][:40]}), r"c_fc.weight has shape \(40, 48\)"),
    "another axis count": (lambda t: t.update({FC: torch.zeros(())}), r"has shape \(\), expected"),
    "dense heads": (lambda t: t.update({IN_PROJ: torch.zeros(144, 48)}), r"expected 72 on axis 0"),
    "a path": (lambda t: t.update({"../../evil": torch.zeros(1)}), "is not a valid tensor name"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_invalid_tensors_are_refused(directory: Path, name: str) -> None:
    change, message = BAD_TENSORS[name]
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    relist(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(directory)
    assert "model.safetensors" in str(caught.value)


def test_nothing_that_a_config_names_is_imported(directory: Path) -> None:
    """Read a hostile config that names code in every free field; none is run."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "evil_module.py").write_text("raise SystemExit('imported')")
    config["library"] = config["family"] = "evil_module"
    config["architecture"] = {"auto_map": "evil_module.Model", "__class__": "evil_module.Model"}
    config["provenance"] = {"import": "evil_module", "__reduce__": ["os.system", "touch /tmp/x"]}
    (directory / "config.json").write_text(json.dumps(config))
    assert read(directory).spec.library == "evil_module"
