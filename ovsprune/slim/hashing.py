"""Telling a base model's weights from others, tensor by tensor, without having them."""

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
    """SHA-256 of ``tensor``'s float32 little-endian bytes in row-major order, in hexadecimal.

    The shape does not count, so a flattened or unsqueezed copy has the same hash.
    """
    plain = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
    if sys.byteorder == "big":  # pragma: no cover
        plain = plain.view(torch.uint8).reshape(-1, 4).flip(1).contiguous()
    # read where it lies: Tensor.numpy() would need numpy, bytes() of a storage takes minutes
    size = 4 * tensor.numel()
    content = (ctypes.c_ubyte * size).from_address(plain.data_ptr()) if size else b""
    return hashlib.sha256(content).hexdigest()


def state_hashes(state: Mapping[str, Tensor]) -> dict[str, str]:
    """:func:`tensor_hash` of every tensor, by its name."""
    return {name: tensor_hash(tensor) for name, tensor in state.items()}


def tensors_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over all of :func:`state_hashes`, in the order of the names."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def base_spec(
    model: str, pretrained: str | None, trained: bool, state: Mapping[str, Tensor]
) -> BaseSpec:
    """Describe a base model so that its weights can be recognised later.

    Args:
        model: Its name.
        pretrained: Which weights, or None.
        trained: False if they are random.
        state: Its tower's tensors, canonical name to tensor.
    """
    tensors = state_hashes(state)
    rounded = {name: tensor_hash(_half(tensor)) for name, tensor in state.items()}
    half = {name: digest for name, digest in rounded.items() if digest != tensors[name]}
    return BaseSpec(model, pretrained, trained, tensors, half)


def match(state: Mapping[str, Tensor], base: BaseSpec) -> dict[str, Match]:
    """Compare weights with those of a base model.

    Args:
        state: A tower's tensors by canonical name; queries, keys and values may be apart.
        base: The base model's hashes.

    Returns:
        For every tensor of the base model: ``"equal"`` (bit for bit in float32),
        ``"equal-after-half"`` (equal once both are rounded to float16: one of them was stored in
        half precision), ``"different"``, or ``"missing"``.
    """
    known = {**fuse_qkv(state), **state}  # whichever form the base model has
    return {name: _compare(known.get(name), name, base) for name in base.tensors}


def _compare(tensor: Tensor | None, name: str, base: BaseSpec) -> Match:
    if tensor is None:
        return "missing"
    if tensor_hash(tensor) == base.tensors[name]:
        return "equal"
    # where no hash of the rounded tensor is given, rounding changes nothing
    rounded = base.half.get(name, base.tensors[name])
    return "equal-after-half" if tensor_hash(_half(tensor)) == rounded else "different"


def _half(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).half()
