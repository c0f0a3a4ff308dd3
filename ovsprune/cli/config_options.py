"""Command-line options made from the declarations of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import click
from click.core import ParameterSource

from ovsprune.core.option_docs import range_text
from ovsprune.core.options import Option, options_of

__all__ = ["config_options", "given_options"]

Callback = Callable[..., Any]


def config_options(
    config: type,
    *,
    compare: Literal["all"] | None = None,
    without: Mapping[str, tuple[str, ...]] | None = None,
) -> Callable[[Callback], Callback]:
    """Add the options of a configuration to a command, under their option names.

    Args:
        config: Configuration class.
        compare: Add only options with this value of :attr:`ovsprune.core.options.Option.compare`.
        without: Option name to choices that this command does not offer.
    """
    options = [o for o in options_of(config) if o.command and compare in (None, o.compare)]

    def decorate(function: Callback) -> Callback:
        # Decorators apply from the last to the first, so the help page keeps the order.
        for declared in reversed(options):
            hidden = (without or {}).get(declared.name, ())
            function = _click_option(declared, hidden)(function)
        return function

    return decorate


def given_options(config: type) -> dict[str, Any]:
    """Return the options of the running command that the user gave, by name.

    An option is given on the command line or by its environment variable; an option that has its
    default is left out, so that a recipe can set it.
    """
    context = click.get_current_context()
    defaults = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP, None)
    return {
        o.name: context.params[o.name]
        for o in options_of(config)
        if o.name in context.params and context.get_parameter_source(o.name) not in defaults
    }


def _click_option(declared: Option, hidden: tuple[str, ...]) -> Callable[[Callback], Callback]:
    word = declared.label
    attributes: dict[str, Any] = {"help": _help(declared, hidden), "metavar": declared.metavar}
    if declared.value_type is bool:
        # The negative form overrides a recipe that switches the option on.
        word = f"{word}/--no-{word.removeprefix('--')}"
    else:
        attributes["type"] = declared.value_type
    if declared.repeated:
        attributes["multiple"] = True
    elif not declared.required and declared.factory is None:  # a factory may import torch
        attributes["default"] = declared.default
    if declared.default_text is not None:
        attributes["show_default"] = declared.default_text
    # `is False`, because 0 equals False and a default of 0 is shown.
    elif not (declared.required or declared.default in (None, ()) or declared.default is False):
        attributes["show_default"] = True
    return click.option(word, declared.name, **attributes)


def _help(declared: Option, hidden: tuple[str, ...]) -> str:
    """Return the help text with the choices that are known without importing a registry."""
    text = declared.help
    if declared.methods is not None and not any("default" in name for name in declared.methods):
        text = f"imp: {text}"
    if declared.required and range_text(declared):
        text = f"{text} {range_text(declared)}."
    if isinstance(declared.choices, tuple):
        names = [name for name in declared.choices if name not in hidden]
        text = f"{text} One of {', '.join(names)}."
    return text
