from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ovsprune.slim.hashing import base_spec, match, state_hashes, tensor_hash


def test_hash_covers_float32_little_endian_bytes() -> None:
    values = (1.0, -2.5, 3e-9)
    expected = hashlib.sha256(struct.pack("<3f", *values)).hexdigest()
    tensor = torch.tensor(values)
    assert tensor_hash(tensor) == expected
    assert tensor_hash(tensor.double()) == expected
    assert tensor_hash(tensor.reshape(3, 1)) == expected
    assert tensor_hash(torch.stack([tensor, tensor], dim=1)[:, 0]) == expected  # strided
    assert tensor_hash(nn.Parameter(tensor)) == expected
    assert tensor_hash(tensor + 1e-6) != expected
    assert tensor_hash(torch.zeros(0)) == hashlib.sha256(b"").hexdigest()
    half = torch.tensor([0.1]).half()
    assert tensor_hash(half) == hashlib.sha256(struct.pack("<f", float(half))).hexdigest()
    assert state_hashes({"a": tensor}) == {"a": expected}


def test_base_model_is_recognised(make_tower: Callable[..., nn.Module]) -> None:
    state = make_tower().state_dict()
    base = base_spec("ViT-T-16", "test", True, state)
    assert set(match(state, base).values()) == {"equal"}
    half = {name: tensor.half() for name, tensor in state.items()}
    assert set(match(half, base).values()) == {"equal-after-half"}
    other = make_tower(seed=1).state_dict()
    assert set(match(other, base).values()) == {"different"}
    assert set(match({}, base).values()) == {"missing"}


def test_half_precision_base_is_recognised_in_float32(
    make_tower: Callable[..., nn.Module],
) -> None:
    half = {name: tensor.half() for name, tensor in make_tower().state_dict().items()}
    base = base_spec("ViT-T-16", "test", True, half)
    assert base.half == {}
    assert set(match({n: t.float() for n, t in half.items()}, base).values()) == {"equal"}
    assert set(match(make_tower().state_dict(), base).values()) == {"equal-after-half"}


def test_single_finetuned_tensor_is_different(make_tower: Callable[..., nn.Module]) -> None:
    state = dict(make_tower().state_dict())
    base = base_spec("ViT-T-16", "test", True, state)
    state["positional_embedding"] = state["positional_embedding"] * 1.001
    found = match(state, base)
    assert [name for name, how in found.items() if how != "equal"] == ["positional_embedding"]
    assert found["positional_embedding"] == "different"


@pytest.mark.parametrize("mark", [".", "_"])
def test_separate_queries_keys_and_values_are_recognised(
    make_tower: Callable[..., nn.Module], mark: str
) -> None:
    state = make_tower().state_dict()
    base = base_spec("ViT-T-16", "test", True, state)
    apart = {}
    for name, tensor in state.items():
        if name.endswith("in_proj_weight"):
            stem = name.removesuffix("in_proj_weight")
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                apart[f"{stem}{which}_proj{mark}weight"] = part.half()
        else:
            apart[name] = tensor
    found = match(apart, base)
    assert {how for name, how in found.items() if "in_proj_weight" in name} == {"equal-after-half"}
    assert {how for name, how in found.items() if "in_proj_weight" not in name} == {"equal"}
