"""Training data: scenes rendered once into memory-mapped files, cropped on the fly."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovsprune.calibration.scenes import (
    CLASS_NAMES,
    COLOURS,
    MATERIALS,
    OBJECTS,
    Combination,
    render_scene,
)

CACHED, CROP = 104, 96
PHRASES: tuple[str, ...] = (
    *(
        Combination(colour, material, shape).phrase
        for shape in OBJECTS
        for colour in COLOURS
        for material in MATERIALS
    ),
    *CLASS_NAMES[len(OBJECTS) :],
)
"""All full prompts: every combination, then every background."""

_PHRASE_ID = {phrase: i for i, phrase in enumerate(PHRASES)}


@dataclass(frozen=True)
class Batch:
    """Cropped scenes: images (B, 3, 96, 96) uint8, class and phrase ids (B, 96, 96)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    phrases: NDArray[np.int64]
    captions: list[str]


def _render_chunk(job: tuple[str, int, int, int, int]) -> list[str]:
    folder, count, seed, first, last = job
    images, labels, phrases = _open(Path(folder), count, "r+")
    captions = []
    for index in range(first, last):
        scene = render_scene(index, split="train", seed=seed, size=CACHED)
        images[index], labels[index] = scene.image, scene.labels
        # background classes follow the objects in both lists
        grounds = scene.labels.astype(np.int16) - len(OBJECTS) + len(PHRASES)
        grounds -= len(CLASS_NAMES) - len(OBJECTS)
        lookup = np.array([0, *(_PHRASE_ID[o.combination.phrase] for o in scene.objects)], np.int16)
        phrases[index] = np.where(scene.instances > 0, lookup[scene.instances], grounds)
        captions.append(scene.caption)
    return captions


def _open(folder: Path, count: int, mode: str) -> tuple[np.memmap, np.memmap, np.memmap]:
    plane = (count, CACHED, CACHED)
    return (
        np.memmap(folder / "images.u8", np.uint8, mode, shape=(*plane, 3)),  # type: ignore[call-overload]
        np.memmap(folder / "labels.u8", np.uint8, mode, shape=plane),  # type: ignore[call-overload]
        np.memmap(folder / "phrases.i16", np.int16, mode, shape=plane),  # type: ignore[call-overload]
    )


class Scenes:
    """The training scenes, rendered into ``folder`` unless they are there already."""

    def __init__(self, folder: Path, count: int, seed: int, workers: int = 2) -> None:
        done = folder / f"captions-{count}-{seed}.json"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _open(folder, count, "w+")
            edges = np.linspace(0, count, 8 * workers + 1).astype(int)
            jobs = [(str(folder), count, seed, int(a), int(b)) for a, b in pairwise(edges)]
            with ProcessPoolExecutor(workers) as pool:
                captions = [c for chunk in pool.map(_render_chunk, jobs) for c in chunk]
            partial = done.with_suffix(".part")
            partial.write_text(json.dumps(captions))
            os.replace(partial, done)
        self.captions: list[str] = json.loads(done.read_text())
        self.images, self.labels, self.phrases = _open(folder, count, "r")

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of a step: a pure function of step, size and seed."""
        per_epoch = len(self) // size
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        rows = order[place * size : (place + 1) * size]
        rng = np.random.default_rng((seed, epoch, place))
        tops, lefts = rng.integers(0, CACHED - CROP + 1, (2, size))
        images = np.empty((size, CROP, CROP, 3), np.uint8)
        labels = np.empty((size, CROP, CROP), np.int64)
        phrases = np.empty((size, CROP, CROP), np.int64)
        for i, row in enumerate(rows):
            y = slice(tops[i], tops[i] + CROP)
            x = slice(lefts[i], lefts[i] + CROP)
            images[i] = self.images[row, y, x]
            labels[i] = self.labels[row, y, x]
            phrases[i] = self.phrases[row, y, x]
        return Batch(
            np.ascontiguousarray(images.transpose(0, 3, 1, 2)),
            labels,
            phrases,
            [self.captions[row] for row in rows],
        )
