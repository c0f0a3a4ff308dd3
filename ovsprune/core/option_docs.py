"""Documentation of options, made from their declarations."""

from __future__ import annotations

import textwrap
from typing import TypeVar

from ovsprune.core.options import Option, options_of

__all__ = ["documented", "options_table", "range_text"]

T = TypeVar("T", bound=type)


def documented(config: T) -> T:
    """Add an ``Attributes`` section with every option to the docstring of a configuration."""
    lines = [(config.__doc__ or "").rstrip(), "", "    Attributes:"]
    for declared in options_of(config):
        text = f"{declared.name}: {_sentences(declared)}"
        lines += textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 12)
    config.__doc__ = "\n".join(lines) + "\n"
    return config


def options_table(config: type) -> str:
    """Return a Markdown table of all options: name, type, default, methods, meaning."""
    lines = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for declared in options_of(config):
        cells = (
            f"`{declared.name}`",
            _kind(declared),
            _default(declared),
            _sentences(declared, default=False),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _kind(declared: Option) -> str:
    kind = {bool: "flag", int: "integer", float: "number", str: "text"}[declared.value_type]
    kind += " or object" if declared.objects else ""
    return f"list of {kind}" if declared.repeated else kind


def _default(declared: Option) -> str:
    if declared.default_text is not None:
        return declared.default_text
    if declared.required:
        return "required"
    value = declared.default
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


def _sentences(declared: Option, *, default: bool = True) -> str:
    """Return the help text with default, range, choices and condition."""
    parts = [declared.help]
    if default and not declared.required:
        parts.append(f"Default: {_default(declared)}.")
    if isinstance(declared.choices, tuple):
        parts.append(f"One of {', '.join(f'`{name}`' for name in declared.choices)}.")
    if bounds := range_text(declared):
        parts.append(f"{bounds}.")
    if methods := declared.methods:
        # "--method imp" includes "--method imp --imp-structured".
        shortest = [m for m in methods if not any(m.startswith(f"{other} ") for other in methods)]
        parts.append(f"With {' or '.join(f'`{name}`' for name in shortest)}.")
    if declared.requires is not None:
        parts.append(f"Needs `{declared.requires.label}`.")
    return " ".join(parts)


def range_text(declared: Option) -> str:
    """Return the allowed range in words; empty if there is none."""
    above, below = declared.above, declared.below
    if above is not None and below is not None:
        return f"In ({above:g}, {below:g})"
    if above is not None:
        return f"Above {above:g}"
    if declared.minimum is not None:
        return f"At least {declared.minimum:g}"
    return ""
