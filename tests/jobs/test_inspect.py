from __future__ import annotations

import json
import shutil

import pytest

import ovsprune
from ovsprune.core.errors import CheckpointError
from ovsprune.jobs.inspect import inspect


def test_layers_add_up_to_the_checkpoint(slim):
    record = inspect(slim)
    checkpoint = ovsprune.read(slim)
    assert [layer["name"] for layer in record["layers"]] == list(checkpoint.mask)
    for layer in record["layers"]:
        assert layer["indices"] == checkpoint.mask[layer["name"]].tolist()
        assert layer["kept"] == len(layer["indices"]) <= layer["units"]
    assert sum(layer["units"] - layer["kept"] for layer in record["layers"]) > 0
    assert record["base"] == {
        "model": "small",
        "pretrained": None,
        "trained": False,
        "tensors": len(checkpoint.spec.base.tensors),
    }
    assert record["ratio"] == pytest.approx(0.5, abs=0.01)
    assert record["slim"]["macs"] < record["dense"]["macs"]
    assert record["bytes"] == sum(file.stat().st_size for file in slim.iterdir())
    assert record["protected"] == ["transformer.resblocks.2.attn"]
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "mask.safetensors"])
def test_missing_file_is_named(slim, tmp_path, name):
    broken = tmp_path / "broken"
    shutil.copytree(slim, broken)
    (broken / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        inspect(broken)
