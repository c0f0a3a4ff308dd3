"""Options of one compared method, after its name: ``default:rounds=3:prune-depth``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.options import Option, options_of
from ovsprune.pruning.config import PruneConfig

__all__ = ["parse_options"]


def parse_options(name: str, parts: Iterable[str], config: type = PruneConfig) -> dict[str, Any]:
    """Return option names and values of the parts ``OPTION=VALUE`` and ``FLAG`` of a method.

    Args:
        name: Name of the method with its options, for messages.
        parts: Options as on the command line of ``prune``, without the leading dashes.
        config: Configuration that declares the options.

    Raises:
        OptionError: A value is missing or cannot be read, a flag has a value, or an option that is
            not repeatable is given twice.
        UnknownNameError: There is no such option; the message names the closest.
    """
    known = {o.name.replace("_", "-"): o for o in options_of(config) if o.compare == "method"}
    values: dict[str, Any] = {}
    for part in parts:
        word, equals, text = (piece.strip() for piece in part.partition("="))
        if word not in known:
            raise UnknownNameError("option of a method", word, known)
        declared = known[word]
        value = _value(name, word, declared, text if equals else None)
        if declared.repeated:
            values[declared.name] = (*values.get(declared.name, ()), value)
        elif declared.name in values:
            raise OptionError(f"--methods {name}: {word} is given twice")
        else:
            values[declared.name] = value
    return values


def _value(name: str, word: str, declared: Option, text: str | None) -> Any:
    if declared.value_type is bool:
        if text is not None:
            raise OptionError(f"--methods {name}: {word} takes no value; leave out '={text}'")
        return True
    if not text:
        raise OptionError(f"--methods {name}: {word} needs a value, as in {word}=...")
    try:
        return declared.value_type(text)
    except ValueError as error:
        kind = "a whole number" if declared.value_type is int else "a number"
        raise OptionError(f"--methods {name}: {word} needs {kind}, not {text!r}") from error
