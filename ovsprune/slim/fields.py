"""Checks of values from untrusted JSON; each message names the field and the remedy.

Each function returns its first argument ``value`` if it is valid, and raises a ``CheckpointError``
otherwise. ``where`` is the location of the value, for messages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ovsprune.core.errors import CheckpointError

__all__ = [
    "DOTTED",
    "FILE_NAME",
    "SHA256",
    "array",
    "boolean",
    "choice",
    "integer",
    "invalid",
    "json_value",
    "mapping",
    "number",
    "parse",
    "record",
    "text",
]

# Names of layers and tensors, as in nn.Module. They cannot contain a path separator.
DOTTED = r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*"
# Name of a file in the directory of config.json: no path separator, no leading dot.
FILE_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
SHA256 = r"[0-9a-f]{64}"

T = TypeVar("T")

# Largest int64; no size of a tensor or file can exceed it.
_LARGEST = 2**63 - 1


def _shown(value: Any) -> str:
    """Return ``value`` for a message, shortened to 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def invalid(where: str, value: Any, expected: str) -> CheckpointError:
    """Return the error for a value that is not as expected."""
    return CheckpointError(
        f"{where} is {_shown(value)}, expected {expected}; the file was edited or damaged: copy "
        "or write the checkpoint again"
    )


def parse(document: str | bytes, source: str) -> Any:
    """Parse JSON; duplicate keys, NaN, infinities and encodings other than UTF-8 are refused.

    Raises:
        CheckpointError: The document is invalid; the message names ``source`` and the position.
    """

    def to_dict(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(entries)
        if len(unique) < len(entries):
            names = [name for name, _ in entries]
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {_shown(repeated)} occurs twice in one object")
        return unique

    def refuse_constant(name: str) -> Any:  # json accepts NaN and Infinity by default
        raise ValueError(f"{name} is no JSON number")

    try:
        decoded = document.decode("utf-8") if isinstance(document, bytes) else document
        return json.loads(decoded, object_pairs_hook=to_dict, parse_constant=refuse_constant)
    # RecursionError: json parses nested arrays recursively.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source} is not the JSON of a slim checkpoint ({str(error) or 'nested too deeply'}); "
            "copy the file again or write the checkpoint again"
        ) from None


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Check that a value is a JSON object."""
    if not isinstance(value, dict):
        raise invalid(where, value, "an object")
    return value


def record(
    value: Any, where: str, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """Check that a value is a JSON object with all required keys and no unknown ones."""
    data = mapping(value, where)
    missing = [key for key in required if key not in data]
    if missing:
        raise CheckpointError(
            f"{where} lacks {', '.join(map(repr, missing))}; the file was edited or damaged: copy "
            "or write the checkpoint again"
        )
    unknown = [key for key in data if key not in required and key not in optional]
    if unknown:
        known = ", ".join((*required, *optional))
        raise CheckpointError(
            f"{where} has the unknown field {', '.join(map(_shown, unknown))}; this format version "
            f"knows {known}. Move additional information to provenance; if a newer ovsprune wrote "
            "the file, read it with that version"
        )
    return data


def text(value: Any, where: str, pattern: str | None = None) -> str:
    """Check that a value is a printable string that fully matches ``pattern``, up to 4096 long."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise invalid(where, value, "a string of printable characters")
    if len(value) > 4096:
        raise invalid(where, value, "a string of at most 4096 characters")
    if pattern is not None and re.fullmatch(pattern, value) is None:
        raise invalid(where, value, f"a string that matches {pattern}")
    return value


def choice(value: Any, where: str, known: Sequence[str]) -> str:
    """Check that a value is one of the strings in ``known``."""
    if not isinstance(value, str) or value not in known:
        raise invalid(where, value, f"one of {', '.join(known)}")
    return value


def integer(value: Any, where: str, least: int = 0) -> int:
    """Check that a value is an integer of at least ``least`` and at most 2**63 - 1."""
    # bool is a subclass of int.
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise invalid(where, value, f"a whole number of at least {least}")
    return value


def boolean(value: Any, where: str) -> bool:
    """Check that a value is true or false."""
    if not isinstance(value, bool):
        raise invalid(where, value, "true or false")
    return value


def array(
    value: Any, where: str, check: Callable[[Any, str], T], length: int | None = None
) -> tuple[T, ...]:
    """Check that a value is a JSON array, with ``length`` entries unless that is None.

    Returns:
        Results of ``check``, which gets each entry and its location.
    """
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        raise invalid(where, value, "an array" if length is None else f"an array of {length}")
    return tuple(check(entry, f"{where}[{i}]") for i, entry in enumerate(value))


def number(value: Any, where: str) -> float:
    """Check that a value is a finite number, and return it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(where, value, "a number")
    try:
        as_float = float(value)
    except OverflowError:  # integers in JSON have no bound
        as_float = math.inf
    if not math.isfinite(as_float):
        raise invalid(where, value, "a finite number")
    return as_float


def json_value(value: Any, where: str) -> Any:
    """Return a copy of a value that consists of plain JSON data; mappings become dicts."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):  # File names can contain surrogates, which UTF-8 cannot encode.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float):
        return number(value, where)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise invalid(where, value, "an object with strings as keys")
        return {key: json_value(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    raise invalid(where, value, "plain JSON data")
