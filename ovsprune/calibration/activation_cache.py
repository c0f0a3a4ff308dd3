"""Residual streams of many pictures, walked block by block; never all activations at once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor, nn

from ovsprune.core.protocols import Pictures, Stages

__all__ = [
    "MEMORY_LIMIT",
    "Capture",
    "Enough",
    "Stream",
    "allocate",
    "capture",
    "run_stem",
    "spread_over",
    "stored",
    "walk",
]

MEMORY_LIMIT = 1 << 30
"""Streams larger than this many bytes are memory-mapped to a temporary file."""


def allocate(shape: tuple[int, ...], limit: int = MEMORY_LIMIT) -> Tensor:
    """Uninitialised float32 storage of ``shape``, in memory or, above ``limit`` bytes, on disk."""
    if 4 * int(np.prod(shape)) <= limit:
        return torch.empty(shape)
    # The file has no name any more once it is mapped: the system frees it with the tensor.
    with tempfile.TemporaryFile(prefix="ovsprune-stream-") as file:
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=shape))


class Stream:
    """What all pictures are between two blocks: float32 on the CPU, [pictures, ...].

    It is read and written a batch at a time, in the order of the pictures. A batch of the same
    shape takes the place of the old one; where a block changes the shape, what comes behind it
    is gathered beside, and takes over with the last batch.

    Args:
        tensor: [pictures, ...]; it is written to.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._now = tensor
        self._next: Tensor | None = None

    def __len__(self) -> int:
        return len(self._now)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        return self._now[which]

    def __setitem__(self, part: slice, out: Tensor) -> None:
        if out.shape[1:] == self._now.shape[1:]:
            self._now[part] = out
            return
        if self._next is None:
            self._next = allocate((len(self), *out.shape[1:]))
        self._next[part] = out
        if part.start + len(out) == len(self):
            self._now, self._next = self._next, None

    def copy(self) -> Stream:
        """The same values in storage of their own."""
        return Stream(allocate(tuple(self._now.shape)).copy_(self._now))

    def only(self, which: Tensor) -> Stream:
        """Some of the pictures, int64 [n], in storage of their own."""
        found = allocate((len(which), *self._now.shape[1:]))
        return Stream(torch.index_select(self._now, 0, which, out=found))

    def copy_(self, other: Stream) -> None:
        """Take the values, and the shape, of ``other``."""
        if self._now.shape != other._now.shape:
            self._now = allocate(tuple(other._now.shape))
        self._now.copy_(other._now)


@torch.no_grad()
def run_stem(stages: Stages, pictures: Pictures, batch_size: int) -> Stream:
    """The stream before the first block."""
    device = next(next(iter(stages.blocks.values())).parameters()).device
    batches = pictures.batches(batch_size)
    return Stream(_gathered((stages.stem(images.to(device)) for images in batches), len(pictures)))


def stored(pictures: Pictures, batch_size: int) -> Tensor:
    """All pictures, float32 [pictures, 3, H, W], to be drawn from at random."""
    return _gathered(pictures.batches(batch_size), len(pictures))


def _gathered(parts: Iterable[Tensor], count: int) -> Tensor:
    """Parts [b, ...] one after another, float32 [count, ...] on the CPU."""
    whole: Tensor | None = None
    done = 0
    for part in parts:
        if whole is None:
            whole = allocate((count, *part.shape[1:]))
        whole[done : done + len(part)] = part.float().cpu()
        done += len(part)
    assert whole is not None and done == count
    return whole


class Capture(dict[tuple[str, str], Tensor]):
    """What passed the tapped layers in the last forward: (module, "input"|"output") -> tensor."""


class Enough(Exception):
    """All that was wanted has passed; what comes after it need not run."""


@contextmanager
def capture(
    root: nn.Module, taps: Iterable[tuple[str, str]], prefix: str = "", stop: bool = False
) -> Iterator[Capture]:
    """Record the inputs or outputs of layers while the context is open.

    Args:
        root: Module that holds the layers.
        taps: (dotted name, ``"input"`` or ``"output"``).
        prefix: Dotted name of ``root`` itself inside the tower, which taps' names begin with.
        stop: End every forward, with an exception, as soon as all taps have been passed.
    """
    seen, wanted = Capture(), set(taps)

    def hook_for(key: tuple[str, str]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            # what comes next may work in place
            seen[key] = args[0] if key[1] == "input" else out.clone()
            if stop and len(seen) == len(wanted):
                raise Enough

        return hook

    handles = []
    for name, side in wanted:
        layer = root.get_submodule(name.removeprefix(prefix).removeprefix("."))
        handles.append(layer.register_forward_hook(hook_for((name, side))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def walk(
    block: nn.Module,
    stream: Stream,
    batch_size: int,
    taps: Iterable[tuple[str, str]] = (),
    prefix: str = "",
    advance: bool = False,
) -> Iterator[tuple[slice, Capture]]:
    """Run one block over a stream, a batch at a time, no further than is wanted.

    Args:
        block: Maps stream -> stream.
        stream: Before the block.
        batch_size: Pictures at a time.
        taps: What to record, as for :func:`capture`.
        prefix: Dotted name of the block, which taps' names begin with.
        advance: Put the block's output in the stream's place.

    Yields:
        The pictures of the batch, and what passed the taps; the same object every time.
    """
    device = next(block.parameters()).device
    with capture(block, taps, prefix, stop=not advance) as seen:
        for start in range(0, len(stream), batch_size):
            part = slice(start, start + batch_size)
            seen.clear()
            with suppress(Enough):
                out = block(stream[part].to(device))
            yield part, seen
            if advance:
                stream[part] = out.float().cpu()


def spread_over(count: int, wanted: int) -> Tensor:
    """int64: at most ``wanted`` of ``count`` indices, evenly spread: a folder may be sorted."""
    return torch.linspace(0, count - 1, min(wanted, count)).round().long()
