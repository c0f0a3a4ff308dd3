"""Configurations: frozen dataclasses of options, see :mod:`ovsprune.core.options`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.options import Option, check_value, options_of, sections_of
from ovsprune.core.toml import read_toml, to_toml, write_toml

__all__ = ["BASE", "Config"]

BASE = "base"
"""Table of a recipe that describes the model and not the prune."""

C = TypeVar("C", bound="Config")


class Config:
    """Base of the configurations: frozen dataclasses whose fields are options.

    A subclass that changes what :attr:`variant` returns has several methods, of which an option may
    belong to some only (``methods=``).
    """

    def __post_init__(self) -> None:
        """Turn lists into tuples, so that a configuration can be hashed."""
        for declared in fields(self):  # type: ignore[arg-type]
            value = getattr(self, declared.name)
            if isinstance(value, list):
                object.__setattr__(self, declared.name, tuple(value))

    @property
    def variant(self) -> str:
        """Words of the command line that select the method."""
        return "--method default"

    @classmethod
    def from_options(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build a configuration from option names and values.

        Args:
            values: Option name (``distill_lr``) to value. A section may also be given as a whole,
                as a configuration or as a mapping (``{"distill": {"lr": 1e-4}}``).

        Raises:
            UnknownNameError: There is no such option; the message names the closest.
            OptionError: A required option is missing.
        """
        plain, nested = _split(cls, values)
        missing = [o.label for o in options_of(cls) if o.required and o.name not in plain]
        if missing:
            raise OptionError(f"{missing[0]} is missing: give {' and '.join(missing)}")
        return _nested(cls(**plain), nested)

    def with_options(self: C, values: Mapping[str, Any]) -> C:
        """Return a copy with other values; see :meth:`from_options`."""
        plain, nested = _split(type(self), values)
        changed: C = replace(self, **plain)  # type: ignore[type-var]
        return _nested(changed, nested)

    def value(self, declared: Option) -> Any:
        """Return the value of an option."""
        found: Any = self
        for name in declared.path:
            found = getattr(found, name)
        return found

    def applies(self, declared: Option) -> bool:
        """Return True if the option belongs to the chosen method and its condition holds."""
        if declared.methods is not None and self.variant not in declared.methods:
            return False
        return declared.requires is None or declared.requires.holds(self)

    def check_options(self) -> None:
        """Check every value, and that no option is set that has no effect.

        Raises:
            OptionError: A value has another type, is out of range, or belongs to another method.
            UnknownNameError: A registry has no such name.
        """
        options = options_of(type(self))
        for declared in options:
            check_value(declared, self.value(declared))
        changed = [
            o for o in options if o.changed(self.value(o)) and self.value(o) not in (None, o.off)
        ]
        wrong = [o for o in changed if o.methods is not None and self.variant not in o.methods]
        if wrong:
            owners = " or ".join(wrong[0].methods or ())
            raise OptionError(
                f"{self.variant} does not take {', '.join(o.label for o in wrong)}: "
                f"{wrong[0].label} belongs to {owners}"
            )
        for declared in changed:
            if declared.requires is not None and not declared.requires.holds(self):
                raise OptionError(
                    f"{declared.label} goes with {declared.requires.label} only: add it, or leave "
                    f"{declared.label} out"
                )

    def recorded(self) -> dict[str, Any]:
        """Return the options that belong in the provenance, with JSON values."""
        found: dict[str, Any] = {}
        for declared in options_of(type(self)):
            value = self.value(declared)
            skipped = declared.provenance == "never" or (
                declared.provenance == "changed" and not declared.changed(value)
            )
            if not skipped and self.applies(declared):
                found[declared.name] = list(value) if declared.repeated else value
        return found

    def measurement_key(self) -> tuple[Any, ...]:
        """Return the values of all options on which measured statistics depend."""
        return tuple(self.value(o) for o in options_of(type(self)) if o.measured)

    @classmethod
    def from_file(cls: type[C], path: str | os.PathLike[str], **options: Any) -> C:
        """Read a recipe, a TOML file with the options of this class.

        The table ``[base]`` describes the model and is ignored here; ``ovsprune prune --config``
        uses it.

        Args:
            path: TOML file.
            options: Options that win over those of the file.

        Raises:
            OptionError: The file cannot be read, a value is out of range, or a value that a recipe
                does not record is missing.
            UnknownNameError: A key is not an option; the message names the closest.
        """
        values = read_toml(path, "--config")
        values.pop(BASE, None)
        with _located(path):
            values = _flat(cls, values)
            for declared in options_of(cls):
                if declared.name in values and not cls.unrecorded(declared.name, values):
                    check_value(declared, values[declared.name])
        return cls.from_recorded({**values, **options})

    @classmethod
    def from_recorded(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build a configuration from recorded options.

        Raises:
            OptionError: A value that is not recorded, such as a folder, was not given again.
        """
        for declared in options_of(cls):
            reason = cls.unrecorded(declared.name, values)
            if reason:
                raise OptionError(f"{declared.label} is missing: {reason}")
        return cls.from_options(values)

    @classmethod
    def unrecorded(cls, name: str, values: Mapping[str, Any]) -> str | None:
        """Return why the recorded value of an option must be given again; None if it is usable."""
        return None

    @classmethod
    def recorded_options(cls, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options in a provenance by name, without those that the method ignores."""
        known = {o.name: o for o in options_of(cls)}
        values = dict(provenance)
        for name in sections_of(cls):
            inner = values.pop(name, None)
            if isinstance(inner, Mapping):
                values |= {f"{name}_{key}": value for key, value in inner.items()}
        values = {k: v for k, v in values.items() if k in known and v is not None}
        draft = cls.from_options(values)
        return {k: v for k, v in values.items() if draft.applies(known[k])}

    def to_toml(self, base: Mapping[str, Any] | None = None) -> str:
        """Return the recipe as TOML: every option that has an effect and a value.

        Args:
            base: Contents of the table ``[base]``, which describes the model: ``model``,
                ``pretrained``, ``dtype``.

        Raises:
            OptionError: A value is an object that only Python can give.
        """
        values = {}
        for declared in options_of(type(self)):
            value = self.value(declared)
            if value in (None, ()) or not self.applies(declared):
                continue
            if declared.objects and not isinstance(value, str):
                raise OptionError(
                    f"{declared.label} is an object, which a recipe cannot hold: use a name, or "
                    "give the object from Python"
                )
            values[declared.name] = value
        return to_toml(values, {BASE: base} if base else {})

    def to_file(self, path: str | os.PathLike[str], base: Mapping[str, Any] | None = None) -> None:
        """Write the recipe to a TOML file; see :meth:`to_toml`.

        Raises:
            OptionError: A value is an object that only Python can give.
            OutputError: The file cannot be written.
        """
        write_toml(path, self.to_toml(base))


def _split(
    config: type, values: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split option values into those of the fields and those of the sections' fields."""
    known = {o.name: o for o in options_of(config)}
    sections = sections_of(config)
    plain: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name in sections and not isinstance(value, Mapping):
            plain[name] = value
            continue
        inner = {f"{name}_{key}": v for key, v in value.items()} if name in sections else None
        for flat, one in (inner or ({name: value} if inner is None else {})).items():
            if flat not in known:
                raise UnknownNameError("option", flat, known)
            first, *rest = known[flat].path
            if rest:
                nested.setdefault(first, {})[rest[0]] = one
            else:
                plain[first] = one
    return plain, nested


def _nested(config: C, nested: Mapping[str, Mapping[str, Any]]) -> C:
    changed = {name: replace(getattr(config, name), **values) for name, values in nested.items()}
    return replace(config, **changed) if changed else config  # type: ignore[type-var]


def _flat(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe by name; a table holds the options of a section."""
    known = [o.name for o in options_of(config)]
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            {f"{name}_{key}": inner for key, inner in value.items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
    for name in flat:
        if name not in known:
            raise UnknownNameError("option", name, known)
    return flat


@contextmanager
def _located(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name before the message of an error."""
    try:
        yield
    except (OptionError, UnknownNameError) as error:
        error.args = (f"{os.fspath(path)}: {error}",)
        raise
