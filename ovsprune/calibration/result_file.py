"""Files of intermediate results that record their origin, so that they are not used elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ovsprune.core.errors import DataError, OutputError
from ovsprune.core.files import staged_file
from ovsprune.slim.write import save_tensors

__all__ = ["ResultFile"]


@dataclass(frozen=True)
class ResultFile:
    """Safetensors file with tensors and, in its header, their origin.

    Attributes:
        path: Path of the file, which need not exist yet.
        kind: Name and version of the format in the header, such as ``"ovsprune.statistics/1"``.
        option: Command-line option that names the file, for error messages.
        verb: Past participle for error messages, such as ``"measured"``.
    """

    path: Path
    kind: str
    option: str
    verb: str

    def check_writable(self) -> None:
        """Check that the file can be written, before a long computation.

        Raises:
            OutputError: The path is a directory, or its directory cannot be created or written.
        """
        if self.path.is_dir():
            raise OutputError(f"{self.path} is a directory; pass a file to {self.option}")
        # Missing directories are created later, so the nearest existing one must be writable.
        parent = next(p for p in self.path.absolute().parents if os.path.lexists(p))
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OutputError(f"{parent} cannot be written; pass another file to {self.option}")

    def write(self, tensors: Mapping[str, Tensor], origin: Mapping[str, Any]) -> None:
        """Write the file atomically.

        Args:
            tensors: Name to tensor.
            origin: Everything that the tensors depend on, as JSON values. Other entries may be
                added; :meth:`read` returns them.

        Raises:
            OutputError: The path is a directory or cannot be written.
        """
        self.check_writable()
        with staged_file(self.path) as file:
            save_tensors(dict(tensors), file, (self.kind, json.dumps(origin, sort_keys=True)))

    def read(
        self, origin: Mapping[str, Any], ignored: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the file, if its origin is the same.

        Args:
            origin: Required origin.
            ignored: Names in ``origin`` that are not compared.

        Returns:
            The tensors, and all entries that :meth:`write` stored with them.

        Raises:
            DataError: The file cannot be read, or has another origin; the message names the
                differences.
        """
        path, verb = self.path, self.verb
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read for {self.option}: {error}") from error
        if self.kind not in header:
            raise DataError(
                f"{path} does not contain {self.kind} (its header contains "
                f"{', '.join(header) or 'nothing'}). Pass another file to {self.option}, or delete "
                "this one to start again"
            )
        try:
            stored = dict(json.loads(header[self.kind]))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path} does not record what it was {verb} on ({error}). Delete it to start again"
            ) from error
        differing = [
            f"{key} is {_short(stored.get(key))} in the file and {_short(value)} now"
            for key, value in json.loads(json.dumps(origin)).items()
            if stored.get(key) != value and key not in ignored
        ]
        if differing:
            raise DataError(
                f"{path} was {verb} with other inputs: {'; '.join(differing)}. Pass another file "
                f"to {self.option}, or delete this one to start again"
            )
        return tensors, stored


def _short(value: object) -> str:
    """Return ``repr(value)``, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
