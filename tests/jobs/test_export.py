"""Export: the outputs of the graph equal those of the tower, or no file is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import ovsprune
from ovsprune import backbones
from ovsprune.cli.main import main
from ovsprune.core.errors import ExportError, MissingLibraryError, OptionError, OutputError
from ovsprune.core.protocols import Backbone
from ovsprune.exporting import onnx_graph
from ovsprune.jobs.export import export
from ovsprune.jobs.prune import prune
from tests.contracts.conftest import REPRESENTATIVES

QUICK: dict[str, Any] = {"pairs": 0, "threads": 1}
FREE = {"open_clip-efficientnet", "open_clip-fastvit"}
"""Families, besides the ViTs, that can be exported with dynamic height and width."""


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(4))


def run(file: Path | str, pictures: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    outputs = session.run(["pooled", "dense"], {"images": pictures.numpy()})
    return [torch.from_numpy(np.asarray(x)) for x in outputs]


def error(given: list[Tensor], expected: tuple[Tensor, Tensor]) -> float:
    pairs = [(a, b.detach()) for a, b in zip(given, expected, strict=True)]
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    return max(float((a - b).abs().max() / b.std()) for a, b in pairs)


@pytest.fixture(scope="module")
def dynamic(slim: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Export a slim ViT with dynamic sizes, and return the record."""
    file = tmp_path_factory.mktemp("export") / "deep" / "tower.onnx"
    return export(slim, dynamic=True, output=file, pairs=2, threads=1)


def test_dynamic_graph_accepts_any_size(slim: Path, dynamic: dict[str, Any]) -> None:
    """Sizes not checked by the export: smaller, oblong, and no multiple of the patch size."""
    tower = ovsprune.load(slim)
    for batch, height, width in ((1, 48, 48), (3, 40, 88), (2, 16, 160), (1, 71, 50)):
        pictures = images(batch, height, width)
        assert error(run(dynamic["output"], pictures), tower.outputs(pictures)) < 1e-4
    loaded = backbones.load_backbone(str(slim))  # open_clip's tower, at its native size
    assert (
        error(run(dynamic["output"], images(2, 48, 48)), loaded.outputs(images(2, 48, 48))) < 1e-4
    )


def test_record(slim: Path, dynamic: dict[str, Any]) -> None:
    assert (dynamic["model"], dynamic["format"], dynamic["dynamic"]) == (str(slim), "onnx", True)
    assert dynamic["size"] == [48, 48]
    checks = dynamic["checks"]
    seen = {(row["output"], row["batch"], *row["size"]) for row in checks}
    sizes = [(48, 48), (96, 64)]
    assert seen == {(o, b, *s) for o in ("pooled", "dense") for b in (1, 2) for s in sizes}
    assert 0 < dynamic["relative_error"] <= 1e-4
    assert dynamic["relative_error"] == max(row["relative_error"] for row in checks)
    assert dynamic["max_error"] == max(row["max_error"] for row in checks)
    rows = [(row["runtime"], row["batch"]) for row in dynamic["latency"]]
    assert rows == [("torch", 1), ("onnxruntime", 1), ("torch", 2), ("onnxruntime", 2)]
    assert all(row["speedup"] == 1.0 for row in dynamic["latency"] if row["runtime"] == "torch")
    assert dynamic["bytes"] == Path(dynamic["output"]).stat().st_size


def test_metadata_of_the_file(slim: Path, dynamic: dict[str, Any]) -> None:
    graph = onnx.load(dynamic["output"])
    onnx.checker.check_model(graph)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    spec = ovsprune.read(slim).spec
    assert metadata == dynamic["metadata"]
    base = [metadata[key] for key in ("model", "activation", "trained")]
    assert base == ["small", "quick_gelu", "false"]
    assert float(metadata["ratio"]) == pytest.approx(spec.ratio, abs=1e-6)
    preprocess = json.loads(metadata["preprocess"])
    assert preprocess["size"] == [48, 48]
    assert preprocess["mean"] == list(spec.preprocess.mean)
    assert preprocess["std"] == list(spec.preprocess.std)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert shapes["images"] == ["batch", 3, "height", "width"]
    assert shapes["pooled"] == ["batch", 32]
    assert [entry.version for entry in graph.opset_import] == [dynamic["opset"]]
    content = Path(dynamic["output"]).read_bytes()
    assert b".py" not in content and str(Path.home()).encode() not in content


def test_dense_model_at_another_size_from_the_command_line(
    small_clip: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights go into a second file, as for towers that are too large for one file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnx_graph, "ONE_FILE", 0)
    monkeypatch.setattr(backbones, "load_backbone", lambda name, **_: small_clip)
    command = ["export", "small", "--size", "64x40", "--pairs", "0", "--threads", "1"]
    done = CliRunner().invoke(main, [*command, "--opset", "18", "--json", "-"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    file = tmp_path / "export" / "small.onnx"
    assert record["output"] == str(file)
    assert (record["size"], record["opset"], record["latency"]) == ([64, 40], 18, [])
    assert "standard deviations of the output" in done.stderr
    assert {path.name for path in file.parent.iterdir()} == {"small.onnx", "small.onnx.data"}
    assert record["bytes"] == sum(path.stat().st_size for path in file.parent.iterdir())
    # positions are those of the size already: nothing of the graph resizes anything
    graph = onnx.load(str(file))
    assert not {"Resize", "Range", "Where"} & {node.op_type for node in graph.graph.node}
    outputs = run(file, images(3, 64, 40))
    assert [tuple(x.shape) for x in outputs] == [(3, 32), (3, 32, 8, 5)]
    with pytest.raises(Exception, match="Got: 48 Expected: 40"):
        run(file, images(1, 64, 48))


QUICK_FAMILIES = {"open_clip-convnext", "transformers-vit"}
"""A convolutional and a transformer family; the dynamic sizes are those of the ViT above."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK_FAMILIES else pytest.mark.slow)
        for name in sorted(set(REPRESENTATIVES) - {"open_clip-vit"})
    ],
)
def test_other_families(family: str, tmp_path: Path) -> None:
    prune(REPRESENTATIVES[family](), 0.3, samples=4, criterion="magnitude", allocation="uniform",
          recovery="none", output=tmp_path / "slim")  # fmt: skip
    file = tmp_path / "tower.onnx"
    free = family in FREE
    record = export(tmp_path / "slim", dynamic=free, batch_sizes=(2,), output=file, **QUICK)
    assert record["relative_error"] <= 1e-4
    tower = ovsprune.load(tmp_path / "slim")
    height, width = tower.spec.preprocess.size
    for more in (0, 13) if free else (0,):
        pictures = images(3, height + more, width + 2 * more)
        assert error(run(file, pictures), tower.outputs(pictures)) < 1e-4


def test_inaccurate_graph_is_not_written(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = onnx_graph.open_session

    def off(file: Path, threads: int) -> Any:
        session = honest(file, threads)

        def run(pictures: Tensor) -> tuple[Tensor, Tensor]:
            pooled, dense = session(pictures)
            dense[-1, 0, 0, 0] += 3e-4 * dense.std()
            return pooled, dense

        return run

    monkeypatch.setattr(sys.modules["ovsprune.jobs.export"], "open_session", off)
    with pytest.raises(ExportError, match=r"dense is off by 0\.0003 standard .* nothing was writt"):
        export(slim, output=tmp_path / "new" / "tower.onnx", **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [float("nan"), None])
def test_nan_and_wrong_shapes_are_refused(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float | None
) -> None:
    tower = ovsprune.load(slim)

    def session(pictures: Tensor) -> tuple[Tensor, Tensor]:
        pooled, dense = tower.outputs(pictures)
        return (pooled * wrong, dense) if wrong else (pooled, dense[:, :, 1:])

    job = sys.modules["ovsprune.jobs.export"]
    monkeypatch.setattr(job, "make_graph", lambda *_, **__: 18)
    monkeypatch.setattr(job, "open_session", lambda *_: session)
    with pytest.raises(ExportError, match="pooled is off by nan|dense of the graph has shape"):
        export(slim, output=tmp_path / "tower.onnx", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_failed_export_names_remedies(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Constraints violated (height)!")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    message = (
        r"with dynamic height and width \(Constraints violated.*omit --dynamic and give a --size"
    )
    with pytest.raises(ExportError, match=message):
        export(slim, dynamic=True, output=tmp_path / "tower.onnx", **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_library_is_named(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    message = (
        rf"needs onnx, onnxscript, onnxruntime \({library}: .*pip install 'ovsprune\[export\]'"
    )
    with pytest.raises(MissingLibraryError, match=message):
        export(slim, output=tmp_path / "tower.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tensorrt"}, "--format 'tensorrt' is unknown; known: onnx"),
        ({"size": (0, 48)}, r"size \(0, 48\): give height and width"),
        ({"size": (4, 48)}, "at least one patch"),
        ({"batch_sizes": ()}, "--batch-size : give 1 or more"),
        ({"batch_sizes": (1, 0)}, "--batch-size 1, 0: give 1 or more"),
        ({"pairs": -1}, "--pairs -1: give 0 or more"),
        ({"opset": 9}, r"--opset 9: give a value from 18 to \d+"),
        ({"threads": 0}, "--threads 0"),
        ({"pretrained": "openai"}, "is a slim checkpoint and brings its weights"),
    ],
)
def test_bad_options_are_named(
    slim: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        export(slim, output=tmp_path / "tower.onnx", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["48x", "x48", "48x48x48", "0x48", "big", "-3x4"])
def test_malformed_size_is_refused(slim: Path, size: str) -> None:
    done = CliRunner().invoke(main, ["export", str(slim), f"--size={size}"])
    assert done.exit_code == 2
    assert "give height and width in pixels, as in 320x384" in done.stderr


def test_existing_output_is_refused(slim: Path, tmp_path: Path) -> None:
    file = tmp_path / "tower.onnx"
    file.write_text("mine")
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        export(slim, output=file)
    with pytest.raises(OutputError, match="is a directory; name a file"):
        export(slim, output=tmp_path, overwrite=True)
    assert file.read_text() == "mine"
    export(slim, output=file, overwrite=True, batch_sizes=(1,), **QUICK)
    assert len(run(file, images(1, 48, 48))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tower.onnx"]
