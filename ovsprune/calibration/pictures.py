"""Calibration images: photographs from a folder, or rendered images if none are given."""

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
"""Function of (index, seed, size) that returns sRGB [size, size, 3]."""

RENDERED: Mapping[str, Render] = {"procedural": _scene, "leaves": _leaves, "mixed": _mixed}
"""Rendered images that ``--calibration`` accepts: scenes like those that ``tiny`` was trained on,
images with the statistics of photographs, and half of each."""

AUTO = "auto"
"""Name of the default, which depends on the model: :func:`made_for`."""


def made_for(model: str) -> str:
    """Return the name in :data:`RENDERED` for a model, if no photographs are given.

    ``tiny`` was trained on scenes. For a tower that was trained on photographs, scenes and leaves
    together retain more accuracy than either alone (``docs/benchmarks.md``).

    >>> made_for("tiny"), made_for("ViT-B-16")
    ('procedural', 'mixed')
    """
    return "procedural" if model == "tiny" else "mixed"


def enough(source: str) -> int:
    """Return the default number of calibration images.

    It is 256, and 1024 for ``leaves`` and ``mixed``: at 70% removed, 1024 retain ten points more of
    the mIoU than 256 (``docs/benchmarks.md``), and any number can be rendered.

    >>> enough("photographs/"), enough("procedural"), enough("mixed")
    (256, 256, 1024)
    """
    return 1024 if source in ("leaves", "mixed") else 256


# Indices of rendered images: calibration begins at 0, the other uses follow without overlap.
_HELD_OUT = 500_000
"""First index of the held-out images, which measure the reported fidelity."""
_UNSEEN = 550_000
"""First index of the validation images of a training."""
_ENDLESS = range(600_000, 1_000_000)
"""Indices of the images of :meth:`RenderedPictures.endless`."""
_MIN_VALIDATION = 8
"""Least number of validation images of a training."""


class RenderedPictures:
    """Images rendered from a seed, at the native size of the tower.

    Each image is rendered once and cached in a temporary file: pruning iterates over the images
    about six times, and rendering takes as long as the forward pass of a small tower.

    Args:
        count: Number of images.
        preprocess: Preprocessing of the tower; its size must be at least 16 pixels per side.
        seed: Seed of the images.
        start: Index of the first image.
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
        self._cache: NDArray[np.uint8] | None = None
        self._cached = np.zeros(count, dtype=bool)

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield float32 [b, 3, H, W] with ``b <= size``; every pass yields the same images."""
        yield from _batches(self._picture, self._count, size)

    def endless(self) -> Iterator[Tensor]:
        """Yield further images [3, H, W] of the same kind, none of which is used elsewhere."""
        return (self._preprocessed(self._rendered(i)) for i in itertools.cycle(_ENDLESS))

    def _picture(self, index: int) -> Tensor:
        if self._cache is None:
            side = max(self._preprocess.size)
            # The file is deleted once it is mapped; the system frees its space with the array.
            with tempfile.TemporaryFile(prefix="ovsprune-pictures-") as file:
                shape = (self._count, side, side, 3)
                self._cache = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
        if not self._cached[index]:
            self._cache[index] = self._rendered(index)
            self._cached[index] = True
        return self._preprocessed(self._cache[index])

    def _rendered(self, index: int) -> NDArray[np.uint8]:
        return self._render(self._start + index, self._seed, max(self._preprocess.size))

    def _preprocessed(self, image: NDArray[np.uint8]) -> Tensor:
        height, width = self._preprocess.size
        if height == width:
            return normalise(image, self._preprocess)
        return to_tensor(Image.fromarray(image), self._preprocess)


class FilePictures:
    """Images from files that can be decoded (see :func:`readable`)."""

    def __init__(self, files: Sequence[Path], preprocess: Preprocess) -> None:
        self.files = tuple(files)
        self._preprocess = preprocess

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield float32 [b, 3, H, W] with ``b <= size``; every pass yields the same images."""
        yield from _batches(self._picture, len(self), size)

    def _picture(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return to_tensor(image, self._preprocess)


def readable(folder: Path, count: int, seed: int, progress: Progress) -> list[Path]:
    """Choose up to ``count`` images of a folder and its sub-folders at random.

    Files that cannot be decoded are reported, and replaced by others if there are any.

    Raises:
        DataError: ``folder`` is not a folder, cannot be read, or contains no image that can be
            decoded.
    """
    listed = _list_images(folder)
    files: list[Path] = []
    broken = 0
    for index in np.random.default_rng(seed).permutation(len(listed)):
        if len(files) == count:
            break
        try:
            with Image.open(listed[index]) as image:
                image.load()
            files.append(listed[index])
        except Exception as error:  # decoders raise any exception on damaged files
            broken += 1
            progress.note(f"skipped {listed[index]}: {error or type(error).__name__}")
    if not files:
        raise DataError(
            f"{folder}: no image can be read ({len(listed)} image files, {broken} of them "
            "damaged). Give a folder with .jpg or .png images, or --calibration leaves."
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
    """Open calibration images and held-out images of one source, which do not overlap.

    Args:
        source: A name in :data:`RENDERED`, or a folder.
        preprocess: Preprocessing of the tower.
        samples: Number of calibration images; a folder may contain fewer.
        held_out: Number of held-out images, which measure the reported fidelity.
        seed: Seed of the choice.
        progress: Progress reporter; it receives notes on skipped files.

    Raises:
        OptionError: ``samples`` is not positive.
        DataError: The folder cannot be read, or contains a single image.
    """
    if samples < 1:
        raise OptionError(f"--samples {samples}: give at least 1 calibration image")
    if source in RENDERED:
        return (
            RenderedPictures(samples, preprocess, seed, source=source),
            RenderedPictures(held_out, preprocess, seed, start=_HELD_OUT, source=source),
        )
    progress = progress or Silent()
    files = readable(Path(source), samples + held_out, seed, progress)
    if len(files) < 2:
        raise DataError(f"{source}: only one image can be read; give at least 2")
    # If the folder is too small for both, a fifth of it is held out.
    n_held_out = min(held_out, max(1, len(files) // 5, len(files) - samples))
    if len(files) - n_held_out < samples:
        progress.note(
            f"{source}: {len(files) - n_held_out} calibration images instead of {samples}"
        )
    return FilePictures(files[n_held_out:], preprocess), FilePictures(
        files[:n_held_out], preprocess
    )


def unseen_pictures(
    source: str, preprocess: Preprocess, samples: int, held_out: int, seed: int, count: int
) -> Pictures | None:
    """Open validation images, disjoint from both results of :func:`open_pictures`.

    All arguments but ``count``, the number of validation images, are those of that call. A
    folder may contain fewer; the result is None if it has fewer than 8 left.
    """
    if source in RENDERED:
        return RenderedPictures(count, preprocess, seed, start=_UNSEEN, source=source)
    first = samples + held_out
    files = readable(Path(source), first + count, seed, Silent())[first:]
    return FilePictures(files, preprocess) if len(files) >= _MIN_VALIDATION else None


def folder_fingerprint(folder: Path) -> str:
    """Return the SHA-256 over names and contents of a folder's images, as 16 hex digits.

    Raises:
        DataError: ``folder`` is not a folder, or cannot be read.
    """
    digest = hashlib.sha256()
    for path in _list_images(folder):
        try:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def calibration_hash(pictures: Pictures) -> str:
    """Return the SHA-256 over the preprocessed images, quantised to eight bits per value."""
    digest = hashlib.sha256()
    for images in pictures.batches(16):
        digest.update((images * 64).round().clamp(-128, 127).to(torch.int8).numpy().tobytes())
    return "sha256:" + digest.hexdigest()


def _batches(picture: Callable[[int], Tensor], count: int, size: int) -> Iterator[Tensor]:
    """Yield batches [b, 3, H, W] of ``count`` images, ``size`` at a time."""
    for start in range(0, count, size):
        yield torch.stack([picture(i) for i in range(start, min(start + size, count))])


def _list_images(folder: Path) -> list[Path]:
    """Return the image files of a folder and its sub-folders, sorted."""
    if not folder.is_dir():
        names = ", ".join((AUTO, *RENDERED))
        raise DataError(f"{folder} is not a folder; --calibration takes a folder or one of {names}")
    try:
        return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
