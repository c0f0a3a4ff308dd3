"""Options that are declared once, as fields of a frozen dataclass.

:func:`option` declares a field: default, help text, choices, range, and where the option appears.
:func:`section` nests one configuration in another. Everything else is derived from these
declarations: checks, provenance and recipe files (:class:`ovsprune.core.config.Config`), the
options of the command line (:mod:`ovsprune.cli.config_options`), the documentation
(:mod:`ovsprune.core.option_docs`), and the options that ``compare`` accepts. This module needs
neither torch nor click.
"""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from importlib import import_module
from numbers import Integral, Real
from operator import attrgetter
from types import NoneType
from typing import Any, Literal

from ovsprune.core.errors import OptionError, UnknownNameError

__all__ = [
    "Option",
    "Requirement",
    "check_value",
    "deferred",
    "option",
    "options_of",
    "section",
]

_TYPES: Mapping[type, tuple[Any, str]] = {
    bool: (bool, "give true or false"),
    int: (Integral, "give a whole number"),  # also numpy's integers
    float: (Real, "give a number"),
    str: (str | os.PathLike, "give a text"),
}
"""Types of options: accepted values, and the advice in messages about others."""
_METADATA = "ovsprune.option"


@dataclass(frozen=True)
class Requirement:
    """Condition under which an option has an effect.

    Attributes:
        label: Words of the command line that fulfil it, such as ``"--budget latency"``.
        holds: Function of the configuration; true if the option has an effect.
    """

    label: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True)
class Option:
    """Declaration of one option.

    Attributes:
        name: Name as a keyword argument and in a recipe; ``distill_lr`` for the field ``lr`` of the
            section ``distill``.
        path: Names of the fields that lead to the value, from the outer configuration on.
        value_type: ``bool``, ``int``, ``float`` or ``str``; of a repeated option, of each value.
        optional: True if None is allowed.
        repeated: True if the value is a tuple.
        objects: True if the value may be an object that only Python can give.
        default: Default, or :data:`dataclasses.MISSING` if it is required or made by ``factory``.
        factory: Makes the default on first use, for a default that depends on a library.
        default_text: Default in words, where the value does not explain itself.
        help: One sentence or two for the help page and the documentation.
        choices: Allowed values, or a function that returns the names in a registry.
        metavar: Placeholder of the value on the help page.
        minimum: Smallest allowed value.
        maximum: Largest allowed value.
        above: Value that must be exceeded.
        below: Value that must not be reached.
        validate: Further check of one value; raises an error of ours.
        methods: Words of the command line that select the methods which take this option; None for
            every method.
        off: Value that switches the option off; accepted with every method.
        requires: Condition under which the option has an effect.
        measured: True if the option changes what is measured on the calibration images. Results
            that were measured with another value are then not reused.
        provenance: When a checkpoint records the value.
        decides: False for a file of intermediate results, which does not change the result.
        compare: ``"method"`` if ``compare`` takes it after a colon, for one method; ``"all"`` if
            ``compare`` takes it for all rows; None if not at all.
        command: True if the command line has the option.
    """

    name: str = ""
    path: tuple[str, ...] = ()
    value_type: type = str
    optional: bool = False
    repeated: bool = False
    objects: bool = False
    default: Any = MISSING
    factory: Callable[[], Any] | None = None
    default_text: str | None = None
    help: str = ""
    choices: tuple[str, ...] | Callable[[], Iterable[str]] | None = None
    metavar: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    validate: Callable[[Any], object] | None = None
    methods: tuple[str, ...] | None = None
    off: Any = None
    requires: Requirement | None = None
    measured: bool = True
    provenance: Literal["always", "changed", "never"] = "always"
    decides: bool = True
    compare: Literal["method", "all"] | None = None
    command: bool = True

    @property
    def label(self) -> str:
        """Name in messages: as on the command line, or the keyword if there is no such option."""
        return f"--{self.name.replace('_', '-')}" if self.command else self.name

    @property
    def required(self) -> bool:
        """True if the option has no default."""
        return self.default is MISSING and self.factory is None

    def default_value(self) -> Any:
        """Return the default, or :data:`dataclasses.MISSING` if the option is required."""
        return self.default if self.factory is None else self.factory()

    def changed(self, value: Any) -> bool:
        """Return True if ``value`` differs from the default."""
        return bool(value != self.default_value())

    def names(self) -> tuple[str, ...]:
        """Return the allowed names; empty if any value is allowed."""
        return tuple(self.choices()) if callable(self.choices) else (self.choices or ())


@dataclass(frozen=True, kw_only=True)
class _Section:
    """Declaration of a nested configuration; what is set here holds for all of its options."""

    config: type
    common: Mapping[str, Any]


def option(default: Any = MISSING, **declaration: Any) -> Any:
    """Declare a dataclass field as an option.

    Args:
        default: Default value; an option without default or ``factory`` is required.
        declaration: Attributes of :class:`Option`.
    """
    declared = Option(default=default, **declaration)
    if declared.factory is not None:
        return field(default_factory=declared.factory, metadata={_METADATA: declared})
    return field(default=default, metadata={_METADATA: declared})


def section(config: type, **common: Any) -> Any:
    """Declare a dataclass field as a nested configuration.

    The options of the section are named ``<field>_<option>``.

    Args:
        config: Dataclass of the section; its defaults are the section's.
        common: Attributes of :class:`Option` that hold for all options of the section.
    """
    return field(
        default_factory=config, metadata={_METADATA: _Section(config=config, common=common)}
    )


def deferred(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports ``module`` when it is called, and calls ``name`` in it.

    The command line reads the declarations before torch is imported.

    Args:
        module: Full name of a module.
        name: Name of a function in it, or of a method of an object (``"CRITERIA.names"``).
    """
    return lambda *args: attrgetter(name)(import_module(module))(*args)


def options_of(config: type) -> tuple[Option, ...]:
    """Return the options of a configuration class in the order of declaration, sections inlined."""
    return _options(config)  # mypy does not accept subclasses of Config as arguments of a cache


@cache
def _options(config: type) -> tuple[Option, ...]:
    hints = typing.get_type_hints(config)  # fields() has the annotations as texts only
    options: list[Option] = []
    for declared_field in fields(config):
        declared = declared_field.metadata.get(_METADATA)
        name = declared_field.name
        if isinstance(declared, _Section):  # inline its options: distill.lr becomes distill_lr
            options += [
                replace(
                    inner,
                    name=f"{name}_{inner.name}",
                    path=(name, *inner.path),
                    **declared.common,
                )
                for inner in options_of(declared.config)
            ]
        elif isinstance(declared, Option):
            options.append(replace(declared, name=name, path=(name,), **_value_type(hints[name])))
    return tuple(options)


def _value_type(hint: Any) -> dict[str, Any]:
    """Return ``value_type``, ``optional``, ``repeated`` and ``objects`` of a type annotation."""
    members = typing.get_args(hint) or (hint,)  # (str, NoneType), (str, ...) of a tuple, (str,)
    return {
        "value_type": next(member for member in members if member in _TYPES),
        "optional": NoneType in members,
        "repeated": typing.get_origin(hint) is tuple,
        "objects": any(member not in (*_TYPES, NoneType, ...) for member in members),
    }


def check_value(declared: Option, value: Any) -> None:
    """Check type, range and choices of one value.

    Raises:
        OptionError: The value has another type or is out of range.
        UnknownNameError: A registry has no such name.
    """
    if value is None and declared.optional:
        return
    if not declared.repeated:
        _check_one(declared, value)
        return
    if isinstance(value, str) or not isinstance(value, tuple | list):
        raise OptionError(f"{declared.label} {value!r}: give a list of strings, not one string")
    for element in value:
        _check_one(declared, element)


def _check_one(declared: Option, value: Any) -> None:
    if not (declared.objects and not isinstance(value, str)):
        _check_type(declared, value)
    # An object given from Python has no name; `validate` checks it.
    names = declared.names() if isinstance(value, str) else ()
    if names and value not in names:
        if callable(declared.choices):  # the names of a registry: name the closest one
            raise UnknownNameError(declared.name.replace("_", " "), value, names)
        raise OptionError(f"{declared.label} {value!r} is unknown; known: {', '.join(names)}")
    if declared.value_type in (int, float) and isinstance(value, Real):
        _check_range(declared, float(value) if declared.value_type is float else value)
    if declared.validate is not None:
        declared.validate(value)


def _check_type(declared: Option, value: Any) -> None:
    expected, advice = _TYPES[declared.value_type]
    # In Python, True is a number.
    is_flag = isinstance(value, bool) and declared.value_type is not bool
    if is_flag or not isinstance(value, expected):
        raise OptionError(f"{declared.label} {value!r}: {advice}")


def _check_range(declared: Option, value: Any) -> None:
    """Check the bounds; a comparison with NaN is false, so NaN fails every bound."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    above, below = declared.above, declared.below
    least, most = declared.minimum, declared.maximum
    if above is not None and below is not None and not above < value < below:
        raise OptionError(
            f"{declared.label} {shown} is outside ({above:g}, {below:g}): {declared.help}"
        )
    if above is not None and not above < value < math.inf:
        raise OptionError(f"{declared.label} {shown}: give a finite number above {above:g}")
    if least is not None and most is not None and not least <= value <= most:
        raise OptionError(f"{declared.label} {shown}: give a whole number from {least} to {most}")
    if least is not None and not value >= least:
        raise OptionError(f"{declared.label} {shown}: give at least {least:g}")
    if most is not None and not value <= most:
        raise OptionError(f"{declared.label} {shown}: give at most {most:g}")
