from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovsprune.core import files
from ovsprune.core.errors import CheckpointError, OutputError
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.write import check_output, write

Write = Callable[..., Path]


@pytest.fixture
def save(make_tower: Callable[..., nn.Module], slim_spec: Any) -> Write:
    """Return a function that writes a checkpoint of the given seed to a path."""

    def to(path: Path, seed: int = 0, **options: Any) -> Path:
        state = make_tower(seed=seed).state_dict()
        spec, mask = slim_spec(state)
        tensors = {f"visual.{k}": v for k, v in cut_state(state, spec, mask).items()}
        return write(path, spec, tensors, mask, **{"card": f"# Seed {seed}\n", **options})

    return to


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(directory)): f.read_bytes() if f.is_file() else b""
        for f in sorted(directory.rglob("*"))
    }


def test_files_and_their_content(save: Write, tmp_path: Path) -> None:
    path = save(tmp_path / "deep" / "down" / "slim")
    assert sorted(f.name for f in path.iterdir()) == [
        "README.md", "config.json", "mask.safetensors", "model.safetensors",
    ]  # fmt: skip
    assert (path / "README.md").read_text() == "# Seed 0\n"
    assert sorted(read(path).spec.files) == ["mask.safetensors", "model.safetensors"]
    assert [p.name for p in path.parent.iterdir()] == ["slim"]


def test_equal_input_gives_equal_bytes(save: Write, tmp_path: Path) -> None:
    assert tree(save(tmp_path / "a")) == tree(save(tmp_path / "b"))


def test_permissions_of_the_output(save: Write, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    slim = save(tmp_path / "slim")
    assert slim.stat().st_mode == (tmp_path / "plain").stat().st_mode
    modes = {file.stat().st_mode for file in slim.iterdir()}
    assert modes == {(tmp_path / "plain" / "file").stat().st_mode}


def test_shared_and_strided_tensors_are_written(
    make_tower: Callable[..., nn.Module], slim_spec: Any, tmp_path: Path
) -> None:
    state = make_tower().state_dict()
    spec, mask = slim_spec(state)
    tensors = {f"visual.{k}": v for k, v in cut_state(state, spec, mask).items()}
    tensors["visual.proj"] = tensors["visual.proj"].T.contiguous().T
    tensors["a"], tensors["b"] = tensors["visual.proj"], torch.arange(10)[3:7]
    back = read(write(tmp_path / "slim", spec, tensors, mask, card="")).tensors
    assert torch.equal(back["a"], state["proj"])
    assert torch.equal(back["visual.proj"], state["proj"])
    assert back["b"].tolist() == [3, 4, 5, 6]


def test_existing_output_is_refused(save: Write, tmp_path: Path) -> None:
    path = save(tmp_path / "slim")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"slim exists already; .* pass --overwrite"):
        save(path, seed=1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("atomic", [True, False])
def test_overwrite_replaces_the_checkpoint(
    save: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    if not atomic:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    path = save(tmp_path / "slim")
    held = read(path)  # mapped into memory, and still whole after the swap
    save(path, seed=1, overwrite=True)
    assert (path / "README.md").read_text() == "# Seed 1\n"
    assert not torch.equal(read(path).tensors["visual.proj"], held.tensors["visual.proj"])
    assert [p.name for p in tmp_path.iterdir()] == ["slim"]


@pytest.mark.skipif(sys.platform != "linux", reason="exchange is a Linux call")
def test_linux_exchanges_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "mark").touch()
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert (tmp_path / "b" / "mark").exists()
    assert not (tmp_path / "a" / "mark").exists()


def test_failed_exchange_restores_the_old_output(
    save: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "slim")
    before = tree(tmp_path)
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="could not be written: Input/output error"):
        save(path, seed=1, overwrite=True)
    assert tree(tmp_path) == before


def test_overwrite_refuses_other_directories(save: Write, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not overwritten, because it is not a slim checkpoint"):
        save(home, overwrite=True)
    path = save(tmp_path / "slim")
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"files that are not part of a slim checkpoint \(thesis"):
        save(path, seed=1, overwrite=True)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="is a file, not a slim checkpoint"):
        save(file, overwrite=True)
    assert (home / "thesis.tex").exists() and (path / "thesis.tex").exists() and file.exists()


def test_empty_directory_is_overwritten(save: Write, tmp_path: Path) -> None:
    (tmp_path / "slim").mkdir()
    assert read(save(tmp_path / "slim", overwrite=True)).spec.family == "open_clip-vit"


def test_link_is_followed(save: Write, tmp_path: Path) -> None:
    save(tmp_path / "slim")
    (tmp_path / "latest").symlink_to(tmp_path / "slim")
    assert save(tmp_path / "latest", seed=1, overwrite=True) == tmp_path / "slim"
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "slim" / "README.md").read_text() == "# Seed 1\n"


def test_check_output_refuses_existing_output(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new") == tmp_path / "new"
    with pytest.raises(OutputError, match="exists already"):
        check_output(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "save_file", "rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_full_disk_leaves_nothing(
    save: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, existing: bool
) -> None:
    out = tmp_path / "parent" / "slim"
    if existing:
        save(out)
    before = tree(tmp_path)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif call == "save_file":
        monkeypatch.setattr(importlib.import_module("ovsprune.slim.write"), "save_file", full)
    else:
        monkeypatch.setattr(files, "move_into_place", full)
    with pytest.raises(OutputError, match=r"the disk is full .*free some space"):
        save(out, seed=1, overwrite=existing)
    assert tree(tmp_path) == before


def test_file_size_limit_leaves_nothing(checkpoint: SlimCheckpoint, tmp_path: Path) -> None:
    """Provoke the error of a real system call while the tensors are written."""
    resource = pytest.importorskip("resource", reason="no limits on a file's size here")
    target = tmp_path / "new" / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # Python ignores the signal
    try:
        with pytest.raises(OutputError, match="could not be written: .*File too large"):
            write(target, checkpoint.spec, checkpoint.tensors, checkpoint.mask, card="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not target.parent.exists()


def test_interrupted_write_leaves_nothing(
    save: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "parent" / "slim")
    assert tree(tmp_path) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory_is_refused(save: Write, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            save(tmp_path / "slim")
    finally:
        tmp_path.chmod(0o700)


def test_file_as_parent_is_refused(save: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="could not be written"):
        save(tmp_path / "file" / "slim")
    assert (tmp_path / "file").read_text() == "x"


def test_inconsistent_input_is_not_written(
    make_tower: Callable[..., nn.Module], slim_spec: Any, tmp_path: Path
) -> None:
    state = make_tower().state_dict()
    spec, mask = slim_spec(state)
    dense = {f"visual.{k}": v for k, v in state.items()}
    with pytest.raises(CheckpointError, match=r"tensors to be written: .* expected 72 on axis 0"):
        write(tmp_path / "slim", spec, dense, mask, card="")
    mask.pop("transformer.resblocks.0.attn")
    with pytest.raises(CheckpointError, match="the mask to be written lacks layers"):
        write(tmp_path / "slim", spec, dense, mask, card="")
    assert tree(tmp_path) == {}
