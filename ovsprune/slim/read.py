"""Reading a slim checkpoint: checked from end to end, nothing unpickled, nothing imported."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.check import TOWER, check_mask, check_tensors
from ovsprune.slim.config import parse
from ovsprune.slim.spec import CONFIG, MASK, MODEL, FileSpec, SlimSpec

__all__ = [
    "SlimCheckpoint",
    "check_files",
    "file_digest",
    "newest_slim",
    "read",
    "read_config",
    "read_spec",
    "read_tensors",
]

# A config of a thousand layers and tensors has some hundred kilobytes.
_LARGEST_CONFIG = 64 * 2**20


@dataclass(frozen=True, eq=False)
class SlimCheckpoint:
    """A slim checkpoint in memory, on the CPU.

    Attributes:
        path: The directory.
        spec: Its ``config.json``.
        mask: Layer name to int64 [kept], ascending indices in the base model's coordinates.
        tensors: Every tensor of ``model.safetensors``, by its name there.
    """

    path: Path
    spec: SlimSpec
    mask: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]

    def tower(self) -> dict[str, Tensor]:
        """The image tower's tensors by canonical name (without ``visual.``)."""
        return {k[len(TOWER) :]: v for k, v in self.tensors.items() if k.startswith(TOWER)}

    def text(self) -> dict[str, Tensor]:
        """Every other tensor: the text tower and the logit scale; empty if there is none."""
        return {k: v for k, v in self.tensors.items() if not k.startswith(TOWER)}


def read(directory: str | os.PathLike[str], *, verify: bool = True) -> SlimCheckpoint:
    """Read a slim checkpoint.

    Args:
        directory: What ``ovsprune prune`` wrote.
        verify: Also compare every file's SHA-256 with the config (about a second per GB).

    Raises:
        CheckpointError: A file is missing, damaged, or does not fit the others.
    """
    path = Path(directory)
    spec = read_spec(path)
    for name in (MODEL, MASK):
        if name not in spec.files:
            raise CheckpointError(f"{path / CONFIG}: files does not list {name}; write it again")
    check_files(path, spec.files, verify=verify)
    mask = read_tensors(path / MASK)
    check_mask(spec, mask, str(path / MASK))
    tensors = read_tensors(path / MODEL)
    check_tensors(spec, tensors, str(path / MODEL))
    return SlimCheckpoint(path, spec, mask, tensors)


def read_spec(directory: str | os.PathLike[str]) -> SlimSpec:
    """The spec of a slim checkpoint alone, without a look at its tensors.

    Raises:
        CheckpointError: The directory or its config is missing or damaged.
    """
    document, file = read_config(directory)
    return parse(document, file)


def read_config(directory: str | os.PathLike[str]) -> tuple[bytes, Path]:
    """The bytes of a checkpoint's ``config.json``, and its path.

    Raises:
        CheckpointError: The directory or the file is missing, or no config by its size.
    """
    path = Path(directory)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; name the directory of a slim checkpoint, as `ovsprune prune` writes it"
        )
    file = _file(path, CONFIG)
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, expected at most {_LARGEST_CONFIG}; "
                "it is no config of a slim checkpoint"
            )
        document = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    return document, file


def check_files(path: Path, files: Mapping[str, FileSpec], *, verify: bool) -> None:
    """Check that the files of a checkpoint are those that its config lists.

    Args:
        path: The directory.
        files: What the config says.
        verify: Compare the SHA-256 too, not the sizes alone.

    Raises:
        CheckpointError: A file is missing, or another one.
    """
    for name, expected in files.items():
        file = _file(path, name)
        size = file.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(
                f"{file} has {size} bytes, the config says {expected.bytes}; it was cut short or "
                "exchanged: copy it again"
            )
        if verify and file_digest(file) != expected.sha256:
            raise CheckpointError(
                f"{file} is not the file that was written (its SHA-256 differs from the config's); "
                "copy it again"
            )


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        CheckpointError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _file(path: Path, name: str) -> Path:
    file = path / name
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no file {name}, so it is no slim checkpoint or an incomplete one; copy "
            "the whole directory again, or write it again with `ovsprune prune`"
        )
    return file


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises:
        CheckpointError: It is none.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is no valid safetensors file ({error}); copy it again or write the checkpoint "
            "again"
        ) from error


def newest_slim(root: str | os.PathLike[str] = "slim") -> Path:
    """Return the directory under ``root`` whose config was written last.

    Raises:
        CheckpointError: There is no slim checkpoint under ``root``.
    """
    found = [path.parent for path in Path(root).glob(f"*/{CONFIG}")]
    if not found:
        raise CheckpointError(
            f"no slim checkpoint was named, and there is none under {Path(root).resolve()}; run "
            "`ovsprune prune` first, or name one (--slim DIR)"
        )
    return max(found, key=lambda path: ((path / CONFIG).stat().st_mtime_ns, path.name))
