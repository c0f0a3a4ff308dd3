"""Configurations: frozen dataclasses of options, see :mod:`ovsprune.core.options`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.files import write_text
from ovsprune.core.options import Option, check_value, options_of
from ovsprune.core.toml import read_toml, to_toml

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
                object.__setattr__(self, declared.name, tuple(value))  # the class is frozen

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
        flat = _known_options(cls, values)
        required = [o for o in options_of(cls) if o.required]
        missing = [o.label for o in required if o.name not in flat]
        if missing:
            raise OptionError(f"{missing[0]} is missing: give {' and '.join(missing)}")
        # The constructor takes whole sections; with_options also takes the options in them.
        return cls(**{o.name: flat[o.name] for o in required}).with_options(flat)

    def with_options(self: C, values: Mapping[str, Any]) -> C:
        """Return a copy with other values; see :meth:`from_options`."""
        flat = _known_options(type(self), values)
        changed: dict[str, Any] = {}
        sections: dict[str, dict[str, Any]] = {}
        for declared in options_of(type(self)):
            if declared.name in flat:
                *section, field = declared.path
                target = sections.setdefault(section[0], {}) if section else changed
                target[field] = flat[declared.name]
        for name, inner in sections.items():
            # replace keeps the other options of the section.
            changed[name] = replace(getattr(self, name), **inner)
        return replace(self, **changed)  # type: ignore[type-var]

    def value(self, declared: Option) -> Any:
        """Return the value of an option."""
        return reduce(getattr, declared.path, self)

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
        # None and the value that switches an option off are accepted with every method.
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
        recorded: dict[str, Any] = {}
        for declared in options_of(type(self)):
            value = self.value(declared)
            if declared.provenance == "never" or not self.applies(declared):
                continue
            # A list, because JSON has no tuples.
            if declared.provenance == "always" or declared.changed(value):
                recorded[declared.name] = list(value) if declared.repeated else value
        return recorded

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
        try:
            values = _known_options(cls, values)
            # Check now, so that messages name the file; FOLDER and the like are no valid values.
            for declared in options_of(cls):
                if declared.name in values and not cls.unrecorded(declared.name, values):
                    check_value(declared, values[declared.name])
        except (OptionError, UnknownNameError) as error:
            error.args = (f"{os.fspath(path)}: {error}",)  # keeps the type of the error
            raise
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
        flat = _flatten(provenance)
        values = {k: v for k, v in flat.items() if k in known and v is not None}
        draft = cls.from_options(values)  # knows which options its method ignores
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
            if value in (None, ()) or not self.applies(declared):  # TOML has no null
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
        write_text(Path(path), self.to_toml(base))


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return option values by name; a section that is given as a whole gives its options."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = vars(value) if isinstance(value, Config) else value
        if isinstance(inner, Mapping):
            flat |= {f"{name}_{key}": inner_value for key, inner_value in inner.items()}
        else:
            flat[name] = value
    return flat


def _known_options(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten option values, and refuse a name that is not an option."""
    known = [o.name for o in options_of(config)]
    flat = _flatten(values)
    for name in flat:
        if name not in known:
            raise UnknownNameError("option", name, known)
    return flat
