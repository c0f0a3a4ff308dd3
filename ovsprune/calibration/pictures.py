"""Calibration pictures: a folder of photographs, or procedural scenes where none are given."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovsprune.calibration.preprocess import normalise, to_tensor
from ovsprune.core.errors import DataError, OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Pictures
from ovsprune.core.records import Preprocess

__all__ = ["FilePictures", "ScenePictures", "calibration_hash", "open_pictures", "readable"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


class ScenePictures:
    """Procedural scenes, rendered at the tower's own size.

    Args:
        count: Number of scenes.
        preprocess: Of the tower; its size must be at least 16 pixels a side.
        seed: Seed of the scenes.
        start: Index of the first scene in the calibration split.
    """

    def __init__(self, count: int, preprocess: Preprocess, seed: int = 0, start: int = 0) -> None:
        self._count, self._preprocess, self._seed, self._start = count, preprocess, seed, start

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield float32 [b, 3, H, W] with ``b <= size``; every pass gives the same pictures."""
        yield from _batches(self._picture, self._count, size)

    def _picture(self, index: int) -> Tensor:
        from ovsprune.calibration.scenes import render_scene

        height, width = self._preprocess.size
        scene = render_scene(
            self._start + index, split="calibration", seed=self._seed, size=max(height, width)
        )
        if height == width:
            return normalise(scene.image, self._preprocess)
        return to_tensor(Image.fromarray(scene.image), self._preprocess)


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
            "broken). Give a folder with .jpg or .png pictures, or --calibration procedural."
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
        source: ``"procedural"`` or a folder.
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
    if source == "procedural":
        return (
            ScenePictures(samples, preprocess, seed),
            ScenePictures(held_out, preprocess, seed, start=500_000),
        )
    progress = progress or Silent()
    files = readable(Path(source), samples + held_out, seed, progress)
    if len(files) < 2:
        raise DataError(f"{source}: only one picture can be read; give at least 2")
    # A small folder is shared: at least one picture, at most a fifth, is held out.
    others = min(held_out, max(1, len(files) // 5))
    if len(files) - others < samples:
        progress.note(f"{source}: {len(files) - others} calibration pictures, not {samples}")
    return FilePictures(files[others:], preprocess), FilePictures(files[:others], preprocess)


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
        raise DataError(f"{folder} is not a folder; --calibration takes one, or 'procedural'")
    try:
        return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
