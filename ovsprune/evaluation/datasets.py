"""Data sets for dense evaluation: labelled folders and procedural scenes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ovsprune.calibration.scenes import CLASS_NAMES, HELD_OUT, OBJECTS, Scene, render_scene
from ovsprune.core.errors import DataError

__all__ = ["VOID", "FolderData", "Sample", "ScenesData", "SegmentationData", "merge_aliases"]

VOID = -1
"""Class index of void pixels."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Sample:
    """Labelled image.

    Attributes:
        image: sRGB, uint8 [H, W, 3].
        label: Class indices, int64 [H, W]; `VOID` for pixels without a class.
        stem: File name of the image without its suffix.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.int64]
    stem: str


class SegmentationData(Protocol):
    """Interface of a data set for evaluation.

    Attributes:
        class_names: Name of each class for tables.
        prompts: Name of each class for the prompts of the text encoder.
        scored: Indices of the classes in the mean, or None for all.
    """

    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    scored: tuple[int, ...] | None

    def __len__(self) -> int:
        """Return the number of images."""

    def __iter__(self) -> Iterator[Sample]:
        """Iterate over the images, always in the same order."""


def merge_aliases(
    names: Sequence[str], aliases: dict[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """Merge the classes that share a prompt.

    Args:
        names: Class names of the data set.
        aliases: Map of class name to the name in its prompt; other classes keep their name.

    Returns:
        Names for tables (``"face/body"`` for a merged class), prompts, and the class index of each
        given name.

    >>> merge_aliases(["face", "cow", "body"], {"face": "person", "body": "person"})
    (('face/body', 'cow'), ('person', 'cow'), (0, 1, 0))
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(aliases.get(name, name), []).append(name)
    prompts = tuple(groups)
    shown = tuple("/".join(dict.fromkeys(members)) for members in groups.values())
    return shown, prompts, tuple(prompts.index(aliases.get(n, n)) for n in names)


class FolderData:
    """Folder with ``images/``, ``labels/`` and ``classes.json``.

    Labels are PNG files of class ids, with the stems and sizes of the images. ``classes.json`` is
    in the folder or in its parent: ``{"void": id or null, "classes": {"id": "name"}, "aliases":
    {"name": "prompt name"}}``. Classes with the same prompt name are merged.

    Args:
        folder: The folder.
        list_file: Text file with one stem per line; all images by default. A relative path is
            resolved from the working directory first, then from the folder.
        limit: Maximum number of images; the first ones are used.

    Raises:
        DataError: A file is missing or malformed. The message names it.
    """

    scored: tuple[int, ...] | None = None

    def __init__(
        self, folder: Path | str, list_file: Path | str | None = None, limit: int | None = None
    ) -> None:
        self.folder = Path(folder)
        for name in ("images", "labels"):
            if not (self.folder / name).is_dir():
                raise DataError(
                    f"{self.folder} has no folder {name}/: a data set is a folder with images/, "
                    "labels/ and classes.json"
                )
        names, ids, aliases, self._void = _read_classes(self.folder)
        self.class_names, self.prompts, classes = merge_aliases(names, aliases)
        self._ids = dict(zip(ids, classes, strict=True))
        images = _images_by_stem(self.folder / "images")
        stems = sorted(images) if list_file is None else _read_list(self.folder, Path(list_file))
        if not stems:
            raise DataError(
                f"no images in {self.folder / 'images'}: expected files of {IMAGE_SUFFIXES}"
            )
        for stem in stems:
            if stem not in images:
                raise DataError(
                    f"{list_file} lists {stem!r}, but there is no such image in "
                    f"{self.folder / 'images'}"
                )
        self._files = [(stem, images[stem]) for stem in stems[:limit]]

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Sample]:
        for stem, path in self._files:
            yield self._read(stem, path)

    def fingerprint(self) -> str:
        """Return the SHA-256 over classes, images and labels, as 16 hexadecimal digits.

        Raises:
            DataError: A file cannot be read.
        """
        digest = hashlib.sha256(repr((self.prompts, sorted(self._ids.items()))).encode())
        for stem, path in self._files:
            for file in (path, self.folder / "labels" / f"{stem}.png"):
                try:
                    # A digest per file: the sum then depends on where one file ends and the next
                    # begins.
                    digest.update(hashlib.sha256(file.read_bytes()).digest())
                except OSError as error:
                    raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
        return digest.hexdigest()[:16]

    def _read(self, stem: str, path: Path) -> Sample:
        """Read an image and its label map, and check that they match."""
        label_path = self.folder / "labels" / f"{stem}.png"
        if not label_path.is_file():
            raise DataError(f"{path} has no label map: expected {label_path}")
        image = np.asarray(_open(path).convert("RGB"))
        # Not converted: a PNG with a palette gives the indices, which are the class ids.
        raw = np.asarray(_open(label_path))
        if raw.ndim != 2 or raw.dtype.kind not in "iub":  # "b": a PNG of 1 bit
            raise DataError(
                f"{label_path} is not a map of class ids (shape {raw.shape}, {raw.dtype}): "
                "expected a PNG with one integer channel"
            )
        if raw.shape != image.shape[:2]:
            raise DataError(
                f"{label_path} is {raw.shape[1]}x{raw.shape[0]}, but {path} is "
                f"{image.shape[1]}x{image.shape[0]}: they must have the same size"
            )
        ids = raw.astype(np.int64)  # [H, W]
        label = np.full(ids.shape, VOID, dtype=np.int64)  # pixels that stay void have no class
        for value in np.unique(ids).tolist():
            if value == self._void:
                continue
            if value not in self._ids:
                raise DataError(
                    f"{label_path} contains the class id {value}, which is not in classes.json "
                    f"(void is {self._void}): add it there"
                )
            label[ids == value] = self._ids[value]
        return Sample(image=image, label=label, stem=stem)


class ScenesData:
    """Procedural scenes as a data set.

    Args:
        count: Number of scenes.
        split: A name in `ovsprune.calibration.scenes.SPLITS`.
        seed: Seed of the data set.
        size: Side in pixels.
        combinations: If true, the classes are the held-out combinations as full phrases, such as
            "red striped mug", and the backgrounds; the mean is then over the combinations. Only
            for the split ``combinations``.

    Raises:
        DataError: The arguments are out of range or contradict each other.
    """

    def __init__(
        self,
        count: int,
        *,
        split: str = "test",
        seed: int = 0,
        size: int = 96,
        combinations: bool = False,
    ) -> None:
        if count < 1:
            raise DataError(f"{count} procedural scenes requested: give at least 1")
        if combinations and split != "combinations":
            raise DataError(
                f"combinations can only be scored on the split 'combinations', not on {split!r}"
            )
        render_scene(count - 1, split=split, seed=seed, size=size)  # checks the arguments
        self._count, self._split, self._seed, self._size = count, split, seed, size
        self._phrases: dict[str, int] | None = None
        self.scored: tuple[int, ...] | None = None
        self.class_names: tuple[str, ...] = CLASS_NAMES
        if combinations:
            phrases = tuple(c.phrase for c in HELD_OUT)
            self._phrases = {phrase: i for i, phrase in enumerate(phrases)}
            self.class_names = phrases + CLASS_NAMES[len(OBJECTS) :]
            self.scored = tuple(range(len(phrases)))
        self.prompts: tuple[str, ...] = self.class_names

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        for index in range(self._count):
            scene = render_scene(index, split=self._split, seed=self._seed, size=self._size)
            yield Sample(scene.image, self._label(scene), f"{self._split}-{self._seed}-{index}")

    def _label(self, scene: Scene) -> NDArray[np.int64]:
        """Return class indices [H, W]: shapes, or combinations followed by backgrounds."""
        label = scene.labels.astype(np.int64)
        if self._phrases is None:
            return label
        # Instance 0 is the background, instance i + 1 the object i. The background classes follow
        # the combinations instead of the shapes.
        by_instance = [0, *(self._phrases[o.combination.phrase] for o in scene.objects)]
        backgrounds = label - len(OBJECTS) + len(self._phrases)
        return np.where(scene.instances > 0, np.array(by_instance)[scene.instances], backgrounds)


def _open(path: Path) -> Image.Image:
    """Open and decode an image file."""
    try:
        with Image.open(path) as image:
            image.load()  # Image.open reads the header only; damaged pixels are found here
            return image
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}): replace or remove it"
        ) from error


def _images_by_stem(folder: Path) -> dict[str, Path]:
    """Map the stems of a folder's images to their paths."""
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in images:
            raise DataError(f"{images[path.stem]} and {path} have the same stem: keep one of them")
        images[path.stem] = path
    return images


def _read_list(folder: Path, path: Path) -> list[str]:
    """Read the stems in a list file."""
    file = next((f for f in (path, folder / path) if f.is_file()), None)
    if file is None:
        raise DataError(f"list file {path} does not exist, in the working directory or in {folder}")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list file {file} cannot be read: {error}") from error
    stems = [line.strip() for line in lines if line.strip()]
    if not stems:
        raise DataError(f"list file {file} names no image: expected one stem per line")
    return stems


def _read_classes(folder: Path) -> tuple[list[str], list[int], dict[str, str], int | None]:
    """Read names, ids, aliases and void id from ``classes.json``."""
    candidates = (folder / "classes.json", folder.parent / "classes.json")
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder} has no classes.json, nor has its parent folder")
    form = '{"void": id or null, "classes": {"id": "name"}, "aliases": {"name": "prompt name"}}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = {int(key): str(name) for key, name in content["classes"].items()}
        aliases = {str(k): str(v) for k, v in content.get("aliases", {}).items()}
        void = None if content.get("void") is None else int(content["void"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not have the form {form} ({error!r})") from error
    if not classes:
        raise DataError(f"{path} names no class: expected the form {form}")
    unknown = sorted(set(aliases) - set(classes.values()))
    if unknown:
        raise DataError(f"{path} has aliases for {', '.join(unknown)}, which are not classes in it")
    ids = sorted(i for i in classes if i != void)
    return [classes[i] for i in ids], ids, aliases, void
