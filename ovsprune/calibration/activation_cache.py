"""Cache of the activations between two blocks, for sequential calibration.

The residual stream of all calibration images is stored between blocks, as in the sequential
pipelines of GPTQ and SparseGPT (llm-compressor calls this the intermediates cache). Activations
inside a block exist for one batch at a time, so memory does not grow with the depth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import torch
from torch import Tensor, nn

from ovsprune.core.protocols import Pictures, Stages

__all__ = [
    "MEMORY_LIMIT",
    "ActivationCache",
    "Capture",
    "StopForward",
    "allocate",
    "capture",
    "collect_images",
    "concatenate",
    "evenly_spaced",
    "run_block",
    "run_stem",
]

MEMORY_LIMIT = 1 << 30
"""Tensors of more bytes than this are memory-mapped to a temporary file."""


def allocate(shape: tuple[int, ...], limit: int = MEMORY_LIMIT) -> Tensor:
    """Return uninitialised float32 storage, in memory or, above ``limit`` bytes, on disk."""
    if 4 * int(np.prod(shape)) <= limit:  # 4 bytes per float32
        return torch.empty(shape)
    # The file is deleted once it is mapped; the system frees its space with the tensor.
    with tempfile.TemporaryFile(prefix="ovsprune-stream-") as file:
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=shape))


class ActivationCache:
    """Activations of all images at one point of the tower, float32 on the CPU, [images, ...].

    It is read and written in batches, in the order of the images. A batch of the same shape
    overwrites the old one. If a block changes the shape, the new batches are collected in separate
    storage, which replaces the old one after the last batch. The given tensor is written to.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._current = tensor
        self._next: Tensor | None = None

    def __len__(self) -> int:
        return len(self._current)

    def __getitem__(self, indices: slice | Tensor) -> Tensor:
        return self._current[indices]

    def __setitem__(self, part: slice, out: Tensor) -> None:
        if out.shape[1:] == self._current.shape[1:]:
            self._current[part] = out
            return
        # The old tensor stays readable, because the remaining batches are still needed.
        if self._next is None:
            self._next = allocate((len(self), *out.shape[1:]))
        self._next[part] = out
        if part.start + len(out) == len(self):
            self._current, self._next = self._next, None

    def copy(self) -> ActivationCache:
        """Return a copy with separate storage."""
        return ActivationCache(allocate(tuple(self._current.shape)).copy_(self._current))

    def select(self, indices: Tensor) -> ActivationCache:
        """Return a copy of some of the images, int64 [n], with separate storage."""
        selected = allocate((len(indices), *self._current.shape[1:]))
        return ActivationCache(torch.index_select(self._current, 0, indices, out=selected))

    def copy_(self, other: ActivationCache) -> None:
        """Copy the values and the shape of ``other`` into this cache."""
        if self._current.shape != other._current.shape:
            self._current = allocate(tuple(other._current.shape))
        self._current.copy_(other._current)


@torch.no_grad()
def run_stem(stages: Stages, pictures: Pictures, batch_size: int) -> ActivationCache:
    """Return the input of the first block for all images."""
    device = next(next(iter(stages.blocks.values())).parameters()).device
    batches = pictures.batches(batch_size)
    parts = (stages.stem(images.to(device)) for images in batches)
    return ActivationCache(concatenate(parts, len(pictures)))


def collect_images(pictures: Pictures, batch_size: int) -> Tensor:
    """Return all images as one tensor, float32 [images, 3, H, W], for random access."""
    return concatenate(pictures.batches(batch_size), len(pictures))


def concatenate(parts: Iterable[Tensor], count: int) -> Tensor:
    """Return the parts [b, ...] as one tensor, float32 [count, ...] on the CPU or on disk."""
    result: Tensor | None = None
    done = 0
    # torch.cat would need twice the memory, so the result is allocated with the first part.
    for part in parts:
        if result is None:
            result = allocate((count, *part.shape[1:]))
        result[done : done + len(part)] = part.float().cpu()
        done += len(part)
    assert result is not None and done == count
    return result


Capture = dict[tuple[str, str], Tensor]
"""Tensors recorded in the last forward pass: (layer, ``"input"`` or ``"output"``) to tensor."""


class StopForward(Exception):
    """Ends a forward pass as soon as all requested tensors are recorded."""


@contextmanager
def capture(
    root: nn.Module, hook_points: Iterable[tuple[str, str]], prefix: str = "", stop: bool = False
) -> Iterator[Capture]:
    """Record inputs or outputs of layers while the context is open.

    Args:
        root: Module that contains the layers.
        hook_points: Pairs of a dotted name and ``"input"`` or ``"output"``.
        prefix: Dotted name of ``root`` in the tower, if the names are relative to the tower.
        stop: Raise :class:`StopForward` in each forward pass as soon as all tensors are recorded.

    Yields:
        The recorded tensors; updated by each forward pass.
    """
    captured: Capture = {}
    points = set(hook_points)

    def hook_for(key: tuple[str, str]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            # The output is cloned because the next layer may change it in place.
            captured[key] = args[0] if key[1] == "input" else out.clone()
            if stop and len(captured) == len(points):
                raise StopForward

        return hook

    with ExitStack() as hooks:
        for name, side in points:
            layer = root.get_submodule(name.removeprefix(prefix).removeprefix("."))
            hooks.enter_context(layer.register_forward_hook(hook_for((name, side))))
        yield captured


@torch.no_grad()
def run_block(
    block: nn.Module,
    cache: ActivationCache,
    batch_size: int,
    hook_points: Iterable[tuple[str, str]] = (),
    prefix: str = "",
    advance: bool = False,
) -> Iterator[tuple[slice, Capture]]:
    """Run one block over the cached activations, in batches.

    Args:
        block: Maps the stream to the stream.
        cache: Input of the block.
        batch_size: Images per batch.
        hook_points: Tensors to record, as for :func:`capture`.
        prefix: Dotted name of the block, with which the names of the hook points begin.
        advance: Replace the cached input with the block's output. Otherwise each forward pass ends
            at the last hook point.

    Yields:
        Indices of the images in the batch, and the recorded tensors (the same object every time).
    """
    device = next(block.parameters()).device
    with capture(block, hook_points, prefix, stop=not advance) as captured:
        for start in range(0, len(cache), batch_size):
            part = slice(start, start + batch_size)
            # Stale entries would end the next forward pass too early.
            captured.clear()
            with suppress(StopForward):
                out = block(cache[part].to(device))
            # The caller sees the batch before its cached input is overwritten.
            yield part, captured
            if advance:
                cache[part] = out.float().cpu()


def evenly_spaced(count: int, limit: int) -> Tensor:
    """Return at most ``limit`` of ``count`` indices, evenly spaced, int64."""
    # The first indices would be a biased sample, because a folder may be sorted.
    return torch.linspace(0, count - 1, min(limit, count)).round().long()
