"""Conversion from and to TOML."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovsprune.core.errors import OptionError

__all__ = ["read_toml", "to_toml"]


def read_toml(path: str | os.PathLike[str], option: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: File.
        option: Option that names the file, for messages.

    Raises:
        OptionError: The file cannot be read, or is not valid TOML.
    """
    # Imported here: the fallback for Python 3.10 is not installed where checkpoints are only read.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise OptionError(
            f"{option} {path} cannot be read: {error.strerror or error}; name an existing file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{option} {path} is not valid TOML: {error}") from error


def to_toml(values: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a TOML document.

    Args:
        values: Top-level keys to strings, numbers, booleans, or lists of these.
        tables: Table name to its keys.

    >>> print(to_toml({"ratio": 0.5, "protect": ["*.0.*"]}, {"base": {"model": "tiny"}}), end="")
    ratio = 0.5
    protect = ["*.0.*"]
    <BLANKLINE>
    [base]
    model = "tiny"
    """
    lines = [f"{name} = {_value(value)}" for name, value in values.items()]
    for table, inner in tables.items():
        lines += ["", f"[{table}]", *(f"{name} = {_value(value)}" for name, value in inner.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):  # first: a bool is an int in Python
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OptionError(f"{value} cannot be written to a recipe; give a finite number")
        return repr(float(value))  # numpy 2 prints its floats as "np.float64(0.5)"
    if isinstance(value, str | os.PathLike):
        # A JSON string is a TOML basic string, except that TOML also escapes DEL.
        return json.dumps(os.fspath(value), ensure_ascii=False).replace("\x7f", "\\u007F")
    return str(int(value))
