"""Compare weights with those of a base model by hashes, without a copy of the base model."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ovsprune.slim.cutting import fuse_qkv
from ovsprune.slim.spec import BaseSpec

__all__ = ["Match", "base_spec", "match", "state_hashes", "tensor_hash", "tensors_hash"]

Match = Literal["equal", "equal-after-half", "different", "missing"]


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values, in hexadecimal.

    The hash covers the float32 little-endian bytes in row-major order. It does not depend on the
    shape: a flattened or unsqueezed copy has the same hash.
    """
    plain = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
    if sys.byteorder == "big":  # pragma: no cover
        plain = plain.view(torch.uint8).reshape(-1, 4).flip(1).contiguous()
    # Read the memory directly: Tensor.numpy() needs numpy, and bytes(storage) takes minutes.
    size = 4 * tensor.numel()
    content = (ctypes.c_ubyte * size).from_address(plain.data_ptr()) if size else b""
    return hashlib.sha256(content).hexdigest()


def state_hashes(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the :func:`tensor_hash` of every tensor by name."""
    return {name: tensor_hash(tensor) for name, tensor in state.items()}


def tensors_hash(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 over the result of :func:`state_hashes`, in the order of the names."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def base_spec(
    model: str, pretrained: str | None, trained: bool, state: Mapping[str, Tensor]
) -> BaseSpec:
    """Describe a base model, with hashes of its tensors ``state`` (by canonical name)."""
    tensors = state_hashes(state)
    rounded = {name: tensor_hash(_half(tensor)) for name, tensor in state.items()}
    half = {name: digest for name, digest in rounded.items() if digest != tensors[name]}
    return BaseSpec(model=model, pretrained=pretrained, trained=trained, tensors=tensors, half=half)


def match(state: Mapping[str, Tensor], base: BaseSpec) -> dict[str, Match]:
    """Compare weights with those of a base model.

    Args:
        state: Tensors of a tower by canonical name; query, key and value may be fused or separate.
        base: Description of the base model with its hashes.

    Returns:
        For every tensor of the base model: ``"equal"`` (bit for bit in float32),
        ``"equal-after-half"`` (equal after rounding both to float16, because one of them was
        stored in half precision), ``"different"``, or ``"missing"``.
    """
    # Both forms of query, key and value, because the base model may have either.
    both_forms = {**fuse_qkv(state), **state}
    return {name: _compare(both_forms.get(name), name, base) for name in base.tensors}


def _compare(tensor: Tensor | None, name: str, base: BaseSpec) -> Match:
    """Compare a tensor with the tensor ``name`` of the base model."""
    if tensor is None:
        return "missing"
    if tensor_hash(tensor) == base.tensors[name]:
        return "equal"
    # Without a hash of the rounded tensor, rounding does not change the tensor.
    rounded = base.half.get(name, base.tensors[name])
    return "equal-after-half" if tensor_hash(_half(tensor)) == rounded else "different"


def _half(tensor: Tensor) -> Tensor:
    """Round to float16, on the CPU."""
    return tensor.detach().to("cpu", torch.float32).half()
