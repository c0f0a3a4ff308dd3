"""Calibration pictures: a folder of photographs, or made ones where none are given."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ovsprune.calibration.preprocess import normalise, to_tensor
from ovsprune.core.errors import DataError, OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Pictures
from ovsprune.core.records import Preprocess

__all__ = [
    "AUTO",
    "RENDERED",
    "FilePictures",
    "RenderedPictures",
    "calibration_hash",
    "enough",
    "folder_fingerprint",
    "made_for",
    "open_pictures",
    "readable",
    "unseen_pictures",
]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


def _scene(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    from ovsprune.calibration.scenes import render_scene

    return render_scene(index, split="calibration", seed=seed, size=size).image


def _leaves(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    from ovsprune.calibration.leaves import render_leaves

    return render_leaves(index, seed=seed, size=size)


def _mixed(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    return (_scene, _leaves)[index % 2](index // 2, seed, size)


Render = Callable[[int, int, int], "NDArray[np.uint8]"]
"""(index, seed, size) to sRGB [size, size, 3]."""

RENDERED: Mapping[str, Render] = {"procedural": _scene, "leaves": _leaves, "mixed": _mixed}
"""What ``--calibration`` takes beside folders: scenes as ``tiny`` was trained on, pictures with the
spectra of photographs, and half of each."""

AUTO = "auto"
"""The made pictures that suit the model: :func:`made_for`."""


def made_for(model: str) -> str:
    """Which of :data:`RENDERED` to calibrate a model with, where no photographs are given.

    ``tiny`` was trained on scenes; for a tower that knows photographs, scenes and leaves together
    kept more than either alone (``docs/benchmarks.md``).

    >>> made_for("tiny"), made_for("ViT-B-16")
    ('procedural', 'mixed')
    """
    return "procedural" if model == "tiny" else "mixed"


def enough(source: str) -> int:
    """How many calibration pictures to take where no number is named.

    256; of made ones for towers that know photographs 1024: at 70% removed they kept ten points
    more of the mIoU than 256 (``docs/benchmarks.md``), and there is no end of them.

    >>> enough("photographs/"), enough("procedural"), enough("mixed")
    (256, 256, 1024)
    """
    return 1024 if source in ("leaves", "mixed") else 256


_HELD_OUT = 500_000
"""Index from which pictures are held out."""
_UNSEEN = 550_000
"""Index from which pictures are kept from the repairs, too, to judge a training by."""
_FURTHER = range(600_000, 1_000_000)
"""Indices of those that are neither held out nor asked for by number."""
_FEWEST = 8
"""Pictures that a training can be judged by."""


class RenderedPictures:
    """Pictures made from a seed, at the tower's own size.

    Each is rendered once, and kept in a temporary file: a prune passes over them half a dozen
    times, and rendering takes as long as a small tower's forward pass.

    Args:
        count: Number of pictures.
        preprocess: Of the tower; its size must be at least 16 pixels a side.
        seed: Seed of the pictures.
        start: Index of the first.
        source: A name in :data:`RENDERED`.
    """

    def __init__(
        self,
        count: int,
        preprocess: Preprocess,
        seed: int = 0,
        start: int = 0,
        source: str = "procedural",
    ) -> None:
        self._count, self._preprocess, self._seed, self._start = count, preprocess, seed, start
        self._render = RENDERED[source]
        self._kept: NDArray[np.uint8] | None = None
        self._there = np.zeros(count, dtype=bool)

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield float32 [b, 3, H, W] with ``b <= size``; every pass gives the same pictures."""
        yield from _batches(self._picture, self._count, size)

    def endless(self) -> Iterator[Tensor]:
        """New ones [3, H, W] of the same kind without end, none of them among these or held out."""
        return map(self._made, itertools.cycle(_FURTHER))

    def _picture(self, index: int) -> Tensor:
        if self._kept is None:
            side = max(self._preprocess.size)
            # The file has no name any more once it is mapped: the system frees it with the array.
            with tempfile.TemporaryFile(prefix="ovsprune-pictures-") as file:
                shape = (self._count, side, side, 3)
                self._kept = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
        if not self._there[index]:
            self._kept[index] = self._rendered(index)
            self._there[index] = True
        return self._prepared(self._kept[index])

    def _made(self, index: int) -> Tensor:
        return self._prepared(self._rendered(index))

    def _rendered(self, index: int) -> NDArray[np.uint8]:
        return self._render(self._start + index, self._seed, max(self._preprocess.size))

    def _prepared(self, image: NDArray[np.uint8]) -> Tensor:
        height, width = self._preprocess.size
        if height == width:
            return normalise(image, self._preprocess)
        return to_tensor(Image.fromarray(image), self._preprocess)


class FilePictures:
    """Photographs from files.

    Args:
        files: Pictures that decode (see :func:`readable`).
        preprocess: Of the tower.
    """

    def __init__(self, files: Sequence[Path], preprocess: Preprocess) -> None:
        self.files = tuple(files)
        self._preprocess = preprocess

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield float32 [b, 3, H, W] with ``b <= size``; every pass gives the same pictures."""
        yield from _batches(self._picture, len(self.files), size)

    def _picture(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return to_tensor(image, self._preprocess)


def readable(folder: Path, count: int, seed: int, progress: Progress) -> list[Path]:
    """Up to ``count`` pictures of ``folder`` and its sub-folders, chosen by ``seed``.

    Files that do not decode are skipped and noted; others take their place while there are any.

    Raises:
        DataError: ``folder`` is no folder, cannot be read, or holds no picture that decodes.
    """
    found = _listing(folder)
    files: list[Path] = []
    broken = 0
    for at in np.random.default_rng(seed).permutation(len(found)):
        if len(files) == count:
            break
        try:
            with Image.open(found[at]) as image:
                image.load()
            files.append(found[at])
        except Exception as error:  # Decoders raise whatever they like on broken files.
            broken += 1
            progress.note(f"skipped {found[at]}: {error or type(error).__name__}")
    if not files:
        raise DataError(
            f"{folder}: no picture that can be read ({len(found)} picture files, {broken} of them "
            "broken). Give a folder with .jpg or .png pictures, or --calibration leaves."
        )
    return files


def open_pictures(
    source: str,
    preprocess: Preprocess,
    samples: int,
    held_out: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Pictures, Pictures]:
    """Calibration pictures, and others from the same source that calibration never sees.

    Args:
        source: A name in :data:`RENDERED`, or a folder.
        preprocess: Of the tower.
        samples: Calibration pictures wanted; a folder may hold fewer.
        held_out: Held-out pictures wanted, for the fidelity that is reported.
        seed: Chooses the pictures.
        progress: Is told of files that were skipped.

    Raises:
        OptionError: ``samples`` is not positive.
        DataError: The folder cannot be used, or holds a single picture.
    """
    if samples < 1:
        raise OptionError(f"--samples {samples}: give at least 1 calibration picture")
    if source in RENDERED:
        return (
            RenderedPictures(samples, preprocess, seed, source=source),
            RenderedPictures(held_out, preprocess, seed, start=_HELD_OUT, source=source),
        )
    progress = progress or Silent()
    files = readable(Path(source), samples + held_out, seed, progress)
    if len(files) < 2:
        raise DataError(f"{source}: only one picture can be read; give at least 2")
    # Held out is what calibration does not want; of a folder too small for both, at most a fifth.
    others = min(held_out, max(1, len(files) // 5, len(files) - samples))
    if len(files) - others < samples:
        progress.note(f"{source}: {len(files) - others} calibration pictures, not {samples}")
    return FilePictures(files[others:], preprocess), FilePictures(files[:others], preprocess)


def unseen_pictures(
    source: str, preprocess: Preprocess, samples: int, held_out: int, seed: int, count: int
) -> Pictures | None:
    """Still others, which :func:`open_pictures` gives neither to calibration nor as held out.

    Args:
        source: A name in :data:`RENDERED`, or a folder.
        preprocess: Of the tower.
        samples: As for :func:`open_pictures`.
        held_out: Likewise.
        seed: Likewise.
        count: Wanted; a folder may have fewer left.

    Returns:
        None where a folder has fewer than 8 left.
    """
    if source in RENDERED:
        return RenderedPictures(count, preprocess, seed, start=_UNSEEN, source=source)
    first = samples + held_out
    files = readable(Path(source), first + count, seed, Silent())[first:]
    return FilePictures(files, preprocess) if len(files) >= _FEWEST else None


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's pictures, as 16 hexadecimal digits.

    Raises:
        DataError: ``folder`` is no folder, or cannot be read.
    """
    digest = hashlib.sha256()
    for path in _listing(folder):
        try:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def calibration_hash(pictures: Pictures) -> str:
    """SHA-256 over the preprocessed pictures, eight bits a value: what calibration really saw."""
    digest = hashlib.sha256()
    for images in pictures.batches(16):
        digest.update((images * 64).round().clamp(-128, 127).to(torch.int8).numpy().tobytes())
    return "sha256:" + digest.hexdigest()


def _batches(picture: Callable[[int], Tensor], count: int, size: int) -> Iterator[Tensor]:
    for start in range(0, count, size):
        yield torch.stack([picture(i) for i in range(start, min(start + size, count))])


def _listing(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; --calibration takes one, or {', '.join((AUTO, *RENDERED))}"
        )
    try:
        return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
