"""Files of intermediate results, which say what they depend on and are taken for nothing else."""

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

__all__ = ["KeptFile"]


@dataclass(frozen=True)
class KeptFile:
    """A safetensors file with tensors and, in its header, their origin.

    Attributes:
        path: Where it is, or will be.
        kind: Its name and version in the header, as ``"ovsprune.statistics/1"``.
        option: The option that names it, for what an error says.
        made: How its content comes about, as ``"measured"``.
    """

    path: Path
    kind: str
    option: str
    made: str

    def check_place(self) -> None:
        """Make sure that the file can be made; asked before the long work.

        Raises:
            OutputError: It is a directory, or its directory cannot be made or written.
        """
        if self.path.is_dir():
            raise OutputError(f"{self.path} is a directory; {self.option} names a file")
        above = next(place for place in self.path.absolute().parents if os.path.lexists(place))
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise OutputError(f"{above} cannot be written; name another file with {self.option}")

    def write(self, tensors: Mapping[str, Tensor], origin: Mapping[str, Any]) -> None:
        """Write the file, whole or not at all.

        Args:
            tensors: Name to tensor.
            origin: Everything that they depend on, as JSON values; more may stand beside it.

        Raises:
            OutputError: It is a directory, or cannot be written.
        """
        self.check_place()
        with staged_file(self.path) as file:
            save_tensors(dict(tensors), file, (self.kind, json.dumps(origin, sort_keys=True)))

    def read(
        self, origin: Mapping[str, Any], unasked: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and the whole of what the header says, if they are of the same origin.

        Args:
            origin: What they must depend on.
            unasked: Names in ``origin`` that do not matter.

        Raises:
            DataError: The file is damaged or no such file, or of another origin; says of which.
        """
        path, made = self.path, self.made
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read for {self.option}: {error}") from error
        if self.kind not in notes:
            raise DataError(
                f"{path} holds no {self.kind} (its header says {', '.join(notes) or 'nothing'}): "
                "name another file, or delete it to begin anew"
            )
        try:
            stored = dict(json.loads(notes[self.kind]))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path} does not say what it was {made} on ({error}): delete it to begin anew"
            ) from error
        differing = [
            f"{key} is {_short(stored.get(key))} there and {_short(value)} here"
            for key, value in json.loads(json.dumps(origin)).items()
            if stored.get(key) != value and key not in unasked
        ]
        if differing:
            raise DataError(
                f"{path} was {made} on something else: {'; '.join(differing)}. Name another file, "
                "or delete it to begin anew"
            )
        return tensors, stored


def _short(value: object) -> str:
    """As much of a value as a line has room for."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
