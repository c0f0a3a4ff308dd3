"""Tests that the bytes of format version 1 do not change."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ovsprune.core.records import Costs, Preprocess
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.hashing import base_spec
from ovsprune.slim.load import load
from ovsprune.slim.read import read
from ovsprune.slim.spec import FORMAT_VERSION, LayerSpec, SliceSpec, SlimSpec
from ovsprune.slim.write import write

GOLDEN = Path(__file__).parent / "data" / "format-1"
FILES = ("config.json", "model.safetensors", "mask.safetensors", "README.md")
MASK = {
    "transformer.resblocks.0.attn": torch.tensor([1]),
    "transformer.resblocks.0.mlp": torch.tensor([0, 2, 5]),
    "transformer.resblocks.1.attn": torch.tensor([0, 1]),
    "transformer.resblocks.1.mlp": torch.tensor([1, 2, 3, 4]),
}


def exact(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return pseudo-random numbers that are exact in float32 on every machine."""
    count = torch.Size(shape).numel()
    return (((torch.arange(count) * 7919 + seed * 104729) % 251 - 125) / 256.0).reshape(shape)


def dense_state() -> dict[str, Tensor]:
    width, mlp = 8, 6
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, 3, 4, 4),
        "class_embedding": (width,),
        "positional_embedding": (5, width),
        "proj": (width, 4),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for block in ("transformer.resblocks.0", "transformer.resblocks.1"):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            f"{block}.mlp.c_fc.weight": (mlp, width),
            f"{block}.mlp.c_fc.bias": (mlp,),
            f"{block}.mlp.c_proj.weight": (width, mlp),
            f"{block}.mlp.c_proj.bias": (width,),
        }
    return {name: exact(shape, i) for i, (name, shape) in enumerate(sorted(shapes.items()))}


def golden(directory: Path) -> Path:
    """Write the checkpoint of version 1 again."""
    state = dense_state()
    layers = []
    for i in range(2):
        block = f"transformer.resblocks.{i}"
        slices = (SliceSpec(f"{block}.mlp.c_fc", "out"), SliceSpec(f"{block}.mlp.c_proj", "in"))
        heads, units = MASK[f"{block}.attn"], MASK[f"{block}.mlp"]
        layers += [
            LayerSpec(f"{block}.attn", "heads", block, 2, heads.numel(), 4),
            LayerSpec(f"{block}.mlp", "mlp", block, 6, units.numel(), 1, slices),
        ]
    spec = SlimSpec(
        base=base_spec("ViT-golden", None, False, state),
        family="open_clip-vit",
        library="open_clip_torch",
        library_version="3.3.0",
        architecture={"embed_dim": 4, "vision_cfg": {"image_size": 8, "head_width": 4}},
        activation="quick_gelu",
        preprocess=Preprocess((8, 8)),
        layers=tuple(layers),
        protected=("transformer.resblocks.1.attn",),
        dense=Costs(4000, 1500),
        slim=Costs(3000, 1200),
        provenance={"criterion": "none", "seed": 0, "note": "für immer"},
    )
    tensors = {f"visual.{k}": v for k, v in cut_state(state, spec, MASK).items()}
    tensors["logit_scale"] = torch.tensor(4.5)
    return write(directory, spec, tensors, MASK, card="# ViT-golden, slim\n")


@pytest.mark.parametrize("name", FILES)
def test_written_bytes_equal_the_golden_files(tmp_path: Path, name: str) -> None:
    written = golden(tmp_path / "slim")
    assert sorted(f.name for f in written.iterdir()) == sorted(FILES)
    assert (written / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_golden_checkpoint_is_read() -> None:
    checkpoint = read(GOLDEN)
    assert json.loads((GOLDEN / "config.json").read_text())["format_version"] == FORMAT_VERSION
    assert checkpoint.spec.provenance["note"] == "für immer"
    assert checkpoint.spec.ratio == 0.25
    assert {name: kept.tolist() for name, kept in checkpoint.mask.items()} == {
        name: kept.tolist() for name, kept in MASK.items()
    }
    state = dense_state()
    expected = cut_state(state, checkpoint.spec, checkpoint.mask)
    assert checkpoint.tower().keys() == expected.keys()
    assert all(torch.equal(checkpoint.tower()[name], value) for name, value in expected.items())
    assert checkpoint.text()["logit_scale"].item() == 4.5
    assert checkpoint.spec.base == base_spec("ViT-golden", None, False, state)


def test_golden_checkpoint_computes_the_same_outputs() -> None:
    with torch.no_grad():
        slim = load(GOLDEN)
        images = exact((1, 3, 8, 8), 77)
        pooled, dense = slim(images)[0], slim.dense(images)[0, :, 1, 0]
    torch.testing.assert_close(pooled, torch.tensor(POOLED), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense, torch.tensor(DENSE), atol=1e-5, rtol=1e-5)


def test_mask_file_has_the_documented_bytes() -> None:
    """Check docs/format.md: a length, a JSON header, and int64 little-endian indices."""
    content = (GOLDEN / "mask.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kept = struct.unpack(f"<{entry['shape'][0]}q", content[8 + length :][start:end])
        assert entry["dtype"] == "I64"
        assert list(kept) == MASK[name].tolist()
    assert header.keys() == MASK.keys()


POOLED = [-0.105416, -0.182304, 0.182088, -0.174858]
DENSE = [-0.166509, -0.181193, 0.230919, -0.184705]
