"""Read a slim checkpoint; every file is checked, and none can name code to run or import."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
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
    "TowerTensors",
    "check_files",
    "describe_files",
    "file_digest",
    "newest_slim",
    "read",
    "read_config",
    "read_spec",
    "read_tensors",
]

# In bytes. A config of a thousand layers and tensors has a few hundred kilobytes.
_LARGEST_CONFIG = 64 * 2**20


class TowerTensors:
    """Access to the tensors of a checkpoint, of which those of the image tower have a prefix."""

    tensors: Mapping[str, Tensor]

    def tower(self) -> dict[str, Tensor]:
        """Return the image tower's tensors by canonical name (without ``visual.``)."""
        return {k[len(TOWER) :]: v for k, v in self.tensors.items() if k.startswith(TOWER)}

    def text(self) -> dict[str, Tensor]:
        """Return the other tensors: the text tower and the logit scale; may be empty."""
        return {k: v for k, v in self.tensors.items() if not k.startswith(TOWER)}


@dataclass(frozen=True, eq=False)
class SlimCheckpoint(TowerTensors):
    """Slim checkpoint in memory, on the CPU.

    Attributes:
        path: The directory.
        spec: Content of ``config.json``.
        mask: Layer name to int64 [kept], ascending indices of units of the base model.
        tensors: Tensors of ``model.safetensors`` by name.
    """

    path: Path
    spec: SlimSpec
    mask: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]


def read(directory: str | os.PathLike[str], *, verify: bool = True) -> SlimCheckpoint:
    """Read a slim checkpoint.

    Args:
        directory: Directory that ``ovsprune prune`` wrote.
        verify: Also compare every file's SHA-256 with the config (about a second per GB).

    Raises:
        CheckpointError: A file is missing, damaged, or inconsistent with the others.
    """
    path = Path(directory)
    spec = read_spec(path)
    check_files(path, spec.files, (MODEL, MASK), verify=verify)
    mask = read_tensors(path / MASK)
    # The mask is small; an inconsistent one is reported before the weights are read.
    check_mask(spec, mask, str(path / MASK))
    tensors = read_tensors(path / MODEL)
    check_tensors(spec, tensors, str(path / MODEL))
    return SlimCheckpoint(path, spec, mask, tensors)


def read_spec(directory: str | os.PathLike[str]) -> SlimSpec:
    """Read the spec of a slim checkpoint, without its tensors.

    Raises:
        CheckpointError: The directory or its config is missing or damaged.
    """
    return parse(*read_config(directory))


def read_config(directory: str | os.PathLike[str]) -> tuple[bytes, Path]:
    """Read the bytes of a checkpoint's ``config.json``; also return its path.

    Raises:
        CheckpointError: The directory or the file is missing, or the file is too large.
    """
    path = Path(directory)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {problem}; name the directory of a slim checkpoint, as `ovsprune prune` "
            "writes it"
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


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, FileSpec]:
    """Return digest and size of some files of a directory."""
    files = {name: directory / name for name in names}
    return {n: FileSpec(file_digest(file), file.stat().st_size) for n, file in files.items()}


def check_files(
    path: Path, files: Mapping[str, FileSpec], required: Iterable[str], *, verify: bool
) -> None:
    """Check the files of a checkpoint against the list in its config.

    Args:
        path: The directory.
        files: The list: file name to digest and size.
        required: File names that must be in the list.
        verify: Compare SHA-256 and size, not the size alone.

    Raises:
        CheckpointError: A file is missing or differs from the list.
    """
    for name in required:
        if name not in files:
            raise CheckpointError(f"{path / CONFIG}: files does not list {name}; write it again")
    for name, expected in files.items():
        file = _file(path, name)
        size = file.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(
                f"{file} has {size} bytes, the config says {expected.bytes}; it was cut short or "
                "exchanged: copy it again"
            )
        # Sizes first: they find an incomplete copy without reading it.
        if verify and file_digest(file) != expected.sha256:
            raise CheckpointError(
                f"{file} is not the file that was written (its SHA-256 differs from the config's); "
                "copy it again"
            )


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Raises:
        CheckpointError: The file cannot be read.
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
    """Return the path of a file of a checkpoint, which must exist."""
    file = path / name
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no file {name}, so it is no slim checkpoint or an incomplete one; copy "
            "the whole directory again, or write it again with `ovsprune prune`"
        )
    return file


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        CheckpointError: The file is no valid safetensors file.
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
    configs = list(Path(root).glob(f"*/{CONFIG}"))
    if not configs:
        raise CheckpointError(
            f"no slim checkpoint was named, and there is none under {Path(root).resolve()}; run "
            "`ovsprune prune` first, or name one (--slim DIR)"
        )
    # The name decides between equal times, so that the choice is reproducible.
    newest = max(configs, key=lambda config: (config.stat().st_mtime_ns, config.parent.name))
    return newest.parent
