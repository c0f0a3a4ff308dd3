"""Values out of untrusted JSON, checked one by one; a message names the field and the remedy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ovsprune.core.errors import CheckpointError

__all__ = [
    "DOTTED",
    "FILE_NAME",
    "SHA256",
    "array",
    "boolean",
    "choice",
    "integer",
    "json_value",
    "number",
    "parse",
    "record",
    "text",
]

# Layer and tensor names: what nn.Module names can be, and never a path.
DOTTED = r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*"
# One file beside config.json: no separator, no leading dot.
FILE_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
SHA256 = r"[0-9a-f]{64}"

# Whatever could be meant by more lies beyond what a tensor can hold.
_LARGEST = 2**63 - 1


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _wrong(where: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is {_shown(value)}, expected {expected}; the file was edited or damaged: copy "
        "or write the checkpoint again"
    )


def parse(document: str | bytes, source: str) -> Any:
    """JSON without duplicate keys, NaN, infinities, or an encoding other than UTF-8.

    Raises:
        CheckpointError: It is not that; the message names ``source`` and the position.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            names = [name for name, _ in items]
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {_shown(double)} occurs twice in one object")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        decoded = document.decode("utf-8") if isinstance(document, bytes) else document
        return json.loads(decoded, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source} is not the JSON of a slim checkpoint ({str(error) or 'nested too deeply'}); "
            "copy the file again or write the checkpoint again"
        ) from None


def record(
    value: Any, where: str, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """A JSON object that has every required key and none that this version does not know.

    Raises:
        CheckpointError: It has not.
    """
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    missing = [key for key in required if key not in value]
    if missing:
        raise CheckpointError(
            f"{where} lacks {', '.join(map(repr, missing))}; the file was edited or damaged: copy "
            "or write the checkpoint again"
        )
    unknown = [key for key in value if key not in required and key not in optional]
    if unknown:
        known = ", ".join((*required, *optional))
        raise CheckpointError(
            f"{where} has the unknown field {', '.join(map(_shown, unknown))}; this format version "
            f"knows {known}. What a reader may ignore belongs in provenance; if a newer ovsprune "
            "wrote the file, read it with that one"
        )
    return value


def text(value: Any, where: str, pattern: str | None = None, *, empty: bool = False) -> str:
    """A string, without control characters, that matches ``pattern`` from end to end.

    Raises:
        CheckpointError: It is not.
    """
    if not isinstance(value, str) or not (value or empty) or not value.isprintable():
        raise _wrong(where, value, "a string of printable characters")
    if len(value) > 4096:
        raise _wrong(where, value, "a string of at most 4096 characters")
    if pattern is not None and re.fullmatch(pattern, value) is None:
        raise _wrong(where, value, f"a string that matches {pattern}")
    return value


def choice(value: Any, where: str, known: Sequence[str]) -> str:
    """One of the strings in ``known``.

    Raises:
        CheckpointError: It is not.
    """
    if not isinstance(value, str) or value not in known:
        raise _wrong(where, value, f"one of {', '.join(known)}")
    return value


def integer(value: Any, where: str, least: int = 0) -> int:
    """A whole number of at least ``least``.

    Raises:
        CheckpointError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise _wrong(where, value, f"a whole number of at least {least}")
    return value


def boolean(value: Any, where: str) -> bool:
    """True or false.

    Raises:
        CheckpointError: It is neither.
    """
    if not isinstance(value, bool):
        raise _wrong(where, value, "true or false")
    return value


def array(value: Any, where: str, length: int | None = None) -> list[Any]:
    """A JSON array, of ``length`` entries where that is given.

    Raises:
        CheckpointError: It is not.
    """
    expected = "an array" if length is None else f"an array of {length}"
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        raise _wrong(where, value, expected)
    return list(value)


def number(value: Any, where: str) -> float:
    """A finite number.

    Raises:
        CheckpointError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(where, value, "a number")
    try:
        as_float = float(value)
    except OverflowError:
        as_float = math.inf
    if not math.isfinite(as_float):
        raise _wrong(where, value, "a finite number")
    return as_float


def json_value(value: Any, where: str) -> Any:
    """Any JSON value: whatever its meaning, it is plain data.

    Raises:
        CheckpointError: It cannot be written as JSON.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):  # a file name can hold what UTF-8 cannot
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float):
        return number(value, where)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise _wrong(where, value, "an object with strings as keys")
        return {key: json_value(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise _wrong(where, value, "plain JSON data")
