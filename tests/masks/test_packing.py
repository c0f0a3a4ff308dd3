"""Tests of packed masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ovsprune.core.errors import CheckpointError
from ovsprune.masks.packing import is_packed, pack, read_packed, save_packed, unpack


@pytest.mark.parametrize("shape", [(), (1,), (8,), (3, 5), (2, 3, 1, 7), (0, 4)])
def test_unpack_inverts_pack(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpack(packed, shape, "here"), mask)


def test_first_entry_is_the_lowest_bit() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 0] = True  # entries 1 and 8
    assert pack(mask).tolist() == [2, 1]


def test_views_are_packed_row_by_row() -> None:
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) > 0.5
    assert torch.equal(pack(mask.T), pack(mask.T.contiguous()))


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (torch.zeros(3, dtype=torch.uint8), r"torch.uint8 \(3,\), expected torch.uint8 \(2,\)"),
        (torch.zeros(2), r"torch.float32 \(2,\), expected torch.uint8"),
        (torch.tensor([0, 16], dtype=torch.uint8), "bits beyond the end"),
    ],
)
def test_invalid_bits_are_refused(packed: torch.Tensor, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"the mask of x.*{said}"):
        unpack(packed, (3, 4), "the mask of x")


def test_equal_masks_give_equal_files(tmp_path: Path) -> None:
    masks = {"b.weight": torch.tensor([[True, False]]), "a.weight": torch.ones(3).bool()}
    save_packed(masks, tmp_path / "one.safetensors")
    save_packed(dict(reversed(masks.items())), tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()
    assert is_packed(tmp_path / "one.safetensors")
    found = read_packed(tmp_path / "one.safetensors")
    assert set(found) == set(masks) and all(torch.equal(found[n], masks[n]) for n in masks)


def written(place: Path, header: object, **tensors: torch.Tensor) -> Path:
    file = place / "bad.safetensors"
    save_file(tensors, file, metadata={"ovsprune-masks": json.dumps(header)})
    return file


BYTE = torch.zeros(1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            {"format_version": 2, "shapes": {"w": [3]}},
            "format_version is 2, but this version of ovsprune reads 1",
        ),
        ({"format_version": 1}, "lacks 'shapes'"),
        ({"format_version": 1, "shapes": [3]}, r"shapes is \[3\], expected an object"),
        ({"format_version": 1, "shapes": {"w": [-1]}}, "is -1, expected a whole number"),
        ({"format_version": 1, "shapes": {"w": [2**62, 2**62]}}, r"w is torch.uint8 \(1,\)"),
        ({"format_version": 1, "shapes": {"../w": [3]}}, "a name is '../w'"),
        ({"format_version": 1, "shapes": {"w": [3], "v": [3]}}, "v has no bits or no shape"),
        ({"format_version": 1, "shapes": {}}, "w has no bits or no shape"),
    ],
)
def test_invalid_headers_are_refused(tmp_path: Path, header: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"bad.safetensors.*{said}"):
        read_packed(written(tmp_path, header, w=BYTE))


def test_other_files_are_not_packed(tmp_path: Path) -> None:
    save_file({"w": BYTE}, tmp_path / "plain.safetensors")
    assert not is_packed(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="is not a file of masks"):
        read_packed(tmp_path / "plain.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\x00" * 5)
    assert not is_packed(tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        read_packed(tmp_path / "short.safetensors")
