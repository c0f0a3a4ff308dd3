"""Options of one compared method, after its name: ``default:rounds=3:prune-depth``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.protocols import Distillation

__all__ = ["FLAGS", "VALUES", "parse_options"]

VALUES: dict[str, Callable[[str], Any]] = {
    "rounds": int,
    "floor": str,
    "distill-steps": int,
    "distill-seconds": float,
    "distill-optimizer": str,
    "distill-lr": float,
    "imp-steps": int,
    "imp-lr": float,
}
"""Options of ``prune`` with a value, and what reads it."""

FLAGS = ("uniform-heads", "prune-depth", "imp-rewind")
"""Options of ``prune`` that are given or not."""

_REPEATED = ("floor",)
_DISTILL = "distill-"


def parse_options(name: str, parts: Iterable[str]) -> dict[str, Any]:
    """Fields of :class:`ovsprune.jobs.settings.Settings`, of parts ``OPTION=VALUE`` and ``FLAG``.

    Args:
        name: The whole method's name, for what an error says.
        parts: As they are called on the command line of ``prune``, without the dashes in front.

    Raises:
        OptionError: A value is missing, too much, or no number, or an option is given twice.
        UnknownNameError: There is no such option; names the closest.
    """
    found: dict[str, Any] = {}
    for part in parts:
        option, given, text = (piece.strip() for piece in part.partition("="))
        field = option.replace("-", "_")
        if option in _REPEATED:
            text = _value(name, option, text)
            found[field] = (*found.get(field, ()), text)
        elif field in found:
            raise OptionError(f"--methods {name}: {option} is given twice")
        else:
            found[field] = _value(name, option, text if given else None)
    training = _DISTILL.replace("-", "_")
    distill = {k.removeprefix(training): v for k, v in found.items() if k.startswith(training)}
    rest = {k: v for k, v in found.items() if not k.startswith(training)}
    return rest | ({"distill": Distillation(**distill)} if distill else {})


def _value(name: str, option: str, text: str | None) -> Any:
    if option in FLAGS:
        if text is not None:
            raise OptionError(f"--methods {name}: {option} takes no value; leave out '={text}'")
        return True
    if option not in VALUES:
        raise UnknownNameError("option of a method", option, [*VALUES, *FLAGS])
    if not text:
        raise OptionError(f"--methods {name}: {option} needs a value, as in {option}=...")
    try:
        return VALUES[option](text)
    except ValueError as error:
        kind = "a whole number" if VALUES[option] is int else "a number"
        raise OptionError(f"--methods {name}: {option} needs {kind}, not {text!r}") from error
