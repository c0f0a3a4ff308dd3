"""Foreign checkpoints: tensors are read, and no code of the file runs."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError
from ovsprune.core.unpickle.foreign import read_foreign

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])


def state() -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    return OrderedDict(
        a=torch.randn(3, 4),
        ints=torch.arange(5),
        view=torch.randn(4, 4).t()[1:],
        half=torch.randn(3).half(),
        brain=torch.randn(3).bfloat16(),
        flag=torch.tensor([True, False]),
        scalar=torch.tensor(2.5),
        empty=torch.empty(0, 3),
        parameter=nn.Parameter(torch.randn(2)),
    )


def same(found: Any, wanted: Any) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in wanted.items()
    )


@FORMATS
@pytest.mark.parametrize("container", [None, "model", "state_dict"])
def test_tensors_are_read_unchanged(tmp_path: Path, zipped: bool, container: str | None) -> None:
    saved: Any = state()
    if container:
        saved = {container: saved, "optimizer": {"step": 3}, "iteration": 7}
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = read_foreign(tmp_path / "x.pth")
    assert same(found.tensors, state())
    assert found.container == container
    assert found.other == (("iteration", "optimizer") if container else ())


@FORMATS
def test_a_module_s_state_with_metadata_and_data_parallel_prefix(
    tmp_path: Path, zipped: bool
) -> None:
    parallel = nn.Sequential(OrderedDict(module=nn.Linear(2, 3)))
    path = tmp_path / "x.pth"
    torch.save({"model": parallel.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    found = read_foreign(path)
    assert found.prefix == "module." and sorted(found.tensors) == ["bias", "weight"]


def test_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert same(read_foreign(tmp_path / "x.safetensors").tensors, {"a": torch.ones(2)})


class Run:
    """Object that runs a command if an ordinary unpickler reads it."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


class Evaluate:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return eval, (self.code,)


@FORMATS
def test_hostile_pickle_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    flag = tmp_path / "flag"
    code = f"open({str(flag)!r}, 'w').close()"
    hostile = {"state_dict": state(), "bad": Run(flag), "more": [Evaluate(code), Run(flag)]}
    path = tmp_path / "x.pth"
    torch.save(hostile, path, _use_new_zipfile_serialization=zipped)
    found = read_foreign(path)
    assert same(found.tensors, state())
    assert len(found.inert) == 2 and found.inert[0].endswith(".eval")
    assert not flag.exists()
    torch.load(path, weights_only=False)  # the attack is real
    assert flag.exists()


def test_foreign_classes_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the classes of a training checkpoint by placeholders, and import no module."""
    (tmp_path / "trap.py").write_text("raise RuntimeError('the trap was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    trap: Any = ModuleType("trap")
    trap.Settings = type("Settings", (dict,), {"__module__": "trap"})
    trap.History = type("History", (list,), {"__module__": "trap"})
    settings, history = trap.Settings(a=1), trap.History([1, 2])
    settings.extra = argparse.Namespace(lr=0.1)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "trap", trap)
        torch.save({"model": state(), "cfg": settings, "log": history}, tmp_path / "x.pth")
    found = read_foreign(tmp_path / "x.pth")
    assert same(found.tensors, state())
    assert found.inert == ("argparse.Namespace", "trap.History", "trap.Settings")
    with pytest.raises(RuntimeError, match="the trap was imported"):
        torch.load(tmp_path / "x.pth", weights_only=False)


class Rebuild:
    """Object whose pickle describes a tensor that reaches beyond its storage."""

    def __init__(self, tensor: Tensor, arguments: tuple[Any, ...]) -> None:
        self.tensor, self.arguments = tensor, arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (self.tensor.storage(), *self.arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (1000,), (1,)),
        (5, (4,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (1, -1)),
        (0, (10**12, 10**12), (0, 0)),
        (0, (2,), (1, 1)),
        (0, ("2",), (1,)),
    ],
)
def test_tensors_outside_their_storage_are_refused(
    tmp_path: Path, arguments: tuple[Any, ...]
) -> None:
    saved = {"model": {"w": Rebuild(torch.zeros(8), (*arguments, False, OrderedDict()))}}
    path = tmp_path / "x.pth"
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="reaches beyond|not a size|sizes and"):
        read_foreign(path)


def test_damage_is_reported(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "good.pth")
    good = (tmp_path / "good.pth").read_bytes()
    for name, raw in {
        "cut": good[: len(good) // 2],
        "empty": b"",
        "text": b"not a checkpoint at all",
        "pickle": pickle.dumps({"a": 1}),
    }.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(CheckpointError, match=f"{name}"):
            read_foreign(tmp_path / name)


def test_a_file_without_tensors_lists_its_content(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds no tensors.*it holds: epoch, loss"):
        read_foreign(tmp_path / "x.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a file; give the framework's"):
        read_foreign(tmp_path / "x.pth")


def test_bad_safetensors(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_foreign(tmp_path / "x.safetensors")


def rezip(source: Path, target: Path, change: Any) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            change(new, entry, old.read(entry))


def test_compressed_and_big_endian_zips_are_refused(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.pth")

    def deflate(new: zipfile.ZipFile, entry: zipfile.ZipInfo, raw: bytes) -> None:
        new.writestr(entry.filename, raw, zipfile.ZIP_DEFLATED)

    def big(new: zipfile.ZipFile, entry: zipfile.ZipInfo, raw: bytes) -> None:
        new.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else raw)

    rezip(tmp_path / "x.pth", tmp_path / "deflated.pth", deflate)
    rezip(tmp_path / "x.pth", tmp_path / "big.pth", big)
    with pytest.raises(CheckpointError, match="compressed"):
        read_foreign(tmp_path / "deflated.pth")
    with pytest.raises(CheckpointError, match="big-endian"):
        read_foreign(tmp_path / "big.pth")


def test_storage_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(8)}, tmp_path / "x.pth")

    def shorten(new: zipfile.ZipFile, entry: zipfile.ZipInfo, raw: bytes) -> None:
        new.writestr(entry.filename, raw[:-4] if "/data/" in entry.filename else raw)

    rezip(tmp_path / "x.pth", tmp_path / "short.pth", shorten)
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        read_foreign(tmp_path / "short.pth")


@FORMATS
def test_the_wanted_entry_is_found(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "x.pth"
    held = {"model": {"a": torch.ones(1)}, "odd": {"b.mask": torch.zeros(2)}, "step": 3}
    torch.save(held, file, _use_new_zipfile_serialization=zipped)

    def masked(state: Any) -> bool:
        return any(name.endswith("mask") for name in state)

    assert read_foreign(file).container == "model"
    found = read_foreign(file, masked, "masks")
    assert (found.container, set(found.tensors)) == ("odd", {"b.mask"})
    assert found.other == ("model", "step")
    with pytest.raises(CheckpointError, match="holds no such .* under any entry; it holds: model"):
        read_foreign(file, lambda state: False, "such")


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.visual(x) * self.scale
        return out


@pytest.mark.filterwarnings("ignore:.*jit")
@pytest.mark.parametrize("make", ["trace", "script"])
def test_tensors_of_a_torchscript_archive_are_read(tmp_path: Path, make: str) -> None:
    model = Scripted().eval()
    archive = (
        torch.jit.trace(model, torch.ones(1, 3)) if make == "trace" else torch.jit.script(model)
    )
    torch.jit.save(archive, tmp_path / "x.pt")
    found = read_foreign(tmp_path / "x.pt")
    assert same(found.tensors, model.state_dict())
    assert not any("__torch__" in name for name in found.inert)


@pytest.mark.filterwarnings("ignore:.*jit")
def test_the_code_of_an_archive_is_not_read(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Scripted()), tmp_path / "x.pt")

    def spoil(new: zipfile.ZipFile, entry: zipfile.ZipInfo, raw: bytes) -> None:
        new.writestr(entry.filename, b"no program" if "/code/" in entry.filename else raw)

    rezip(tmp_path / "x.pt", tmp_path / "spoilt.pt", spoil)
    with pytest.raises(RuntimeError):
        torch.jit.load(tmp_path / "spoilt.pt")
    assert "visual.0.weight" in read_foreign(tmp_path / "spoilt.pt").tensors


def archive_of(tmp_path: Path, pickled: bytes) -> Path:
    """Write a zip as torch does, with the given pickle."""
    path = tmp_path / "hostile.pt"
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("archive/data.pkl", pickled)
        new.writestr("archive/byteorder", b"little")
    return path


MODULE = b"c__torch__\nM\n)\x81"  # an instance of __torch__.M


ITSELF = MODULE + b"q\x00}X\x01\x00\x00\x00ah\x00sb."  # a module that is an attribute of itself
TWICE = MODULE + b"}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00"
DOUBLED = MODULE + b"q\x00" + TWICE * 40 + b"."  # 2^40 modules by their names


@pytest.mark.parametrize("pickled", [ITSELF, DOUBLED])
def test_hostile_archives_are_refused(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(CheckpointError, match="inside each other"):
        read_foreign(archive_of(tmp_path, b"\x80\x02" + pickled))


def test_a_pickle_cannot_change_the_class_of_modules(tmp_path: Path) -> None:
    """Ignore state that a pickle sets on a class instead of an instance."""
    on_the_class = b"c__torch__\nM\n}X\x01\x00\x00\x00aK\x01sb0"
    instance = MODULE + b"}b."
    with pytest.raises(CheckpointError, match="holds no tensors .* it holds: a dict"):
        read_foreign(archive_of(tmp_path, b"\x80\x02" + on_the_class + instance))


def arrays() -> dict[str, Any]:
    import numpy as np

    draw = np.random.default_rng(0)
    found: dict[str, Any] = {"conv.weight": draw.normal(size=(4, 3, 2)).astype(np.float32)}
    found["columns"] = np.asfortranarray(draw.normal(size=(3, 5)))
    found |= {"count": np.array(7), "none": np.empty((0, 4), np.float32)}
    return found | {"half": found["conv.weight"].astype(np.float16), "flags": np.ones(3, bool)}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_a_model_zoo(tmp_path: Path, protocol: int) -> None:
    """Read numpy arrays in one pickle, the format of detectron2's model zoos."""
    document = {"model": arrays(), "__author__": "third party", "matching_heuristics": True}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(document, protocol))
    found = read_foreign(tmp_path / "x.pkl")
    assert same(found.tensors, {k: torch.from_numpy(v.copy()) for k, v in arrays().items()})
    assert found.container == "model" and found.inert == ()
    assert found.other == ("__author__", "matching_heuristics")


def test_arrays_of_objects_are_no_tensors(tmp_path: Path) -> None:
    import numpy as np

    odd = {"objects": np.array([{}, None]), "text": np.array(["a"]), "big": np.ones(2, ">f4")}
    document = {"model": {**arrays(), **odd}, "log": [np.array([Evaluate("1")], dtype=object)]}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(document))
    found = read_foreign(tmp_path / "x.pkl")
    assert found.tensors.keys() == arrays().keys()
    assert found.other == ("big", "log", "objects", "text")


class Array:
    """Object whose pickle describes an array of another size than its bytes."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        import numpy as np

        function, given, (_, _, kind, *_) = np.ones(2, np.float32).__reduce__()
        size, raw = self.state
        return function, given, (1, size, kind, False, raw)


@pytest.mark.parametrize(
    "given",
    [((1000,), b"12345678"), ((-1,), b""), ((2**40, 2**40), b"1234"), ((2.0,), b"12345678")],
)
def test_arrays_larger_than_their_bytes_are_refused(
    tmp_path: Path, given: tuple[Any, bytes]
) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"a": Array(*given)}}))
    with pytest.raises(CheckpointError, match=r"x\.pkl: (an array has|it describes an array)"):
        read_foreign(tmp_path / "x.pkl")


def test_arrays_over_the_same_bytes_share_a_storage(tmp_path: Path) -> None:
    """Refuse a small file that describes much memory."""
    raw = bytes(8)
    many = {f"a{i}": Array((2,), raw) for i in range(100)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": many}))
    found = read_foreign(tmp_path / "x.pkl").tensors
    assert len(found) == 100 and len({t.data_ptr() for t in found.values()}) == 1


def test_a_bare_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    for content in ([1, 2], "text"):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match="no torch checkpoint"):
            read_foreign(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"a": [1, 2]}}))
    with pytest.raises(CheckpointError, match=r"holds no tensors .*it holds: model"):
        read_foreign(tmp_path / "x.pkl")
