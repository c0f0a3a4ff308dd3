"""Output of a prune: directory, data type, tensors, and the command that repeats it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from ovsprune import backbones
from ovsprune.core.protocols import Backbone
from ovsprune.masks.spec import MaskedSpec
from ovsprune.pruning.command_line import command_of
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.loading import cast, check_dtype
from ovsprune.slim import SlimSpec

__all__ = ["Saving"]

Spec = TypeVar("Spec", SlimSpec, MaskedSpec)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Output directory and saved form of a prune.

    Attributes:
        directory: Directory to write; None if nothing is written.
        dtype: Name of the floating-point type of the saved tensors.
        text: True if the unmodified text tower is saved too.
    """

    directory: Path | None
    dtype: str
    text: bool

    @classmethod
    def checked(
        cls,
        model: str | Backbone,
        default: str,
        output: str | Path | None,
        check: Callable[[Path], Path],
        *,
        dtype: str,
        text: bool,
        dry_run: bool,
    ) -> Saving:
        """Check data type and output directory; call this before long work.

        Without ``output``, a model that is given by name is saved to ``default``, in which ``{}``
        stands for the canonical name, and a loaded one is not saved. ``check`` returns the absolute
        path of a directory that may be written.

        Raises:
            OptionError: ``dtype`` is unknown.
            OutputError: The directory exists, or holds something else.
        """
        check_dtype(dtype)
        directory = None
        if not dry_run and output is not None:
            directory = check(Path(output))
        elif not dry_run and isinstance(model, str):
            directory = check(Path(default.format(backbones.canonical(model))))
        return cls(directory=directory, dtype=dtype, text=text)

    def tensors(self, model: Backbone, tower: nn.Module) -> dict[str, Tensor]:
        """Return the tensors to save: those of ``tower`` with the prefix ``visual.``, and the text.

        Raises:
            OptionError: A value is too large for the data type.
        """
        # open_clip calls the image tower `visual`; the names of the text tower are complete
        # already.
        state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
        return cast({**state, **(model.text if self.text else {})}, self.dtype)

    def with_command(self, spec: Spec, model: Backbone, config: PruneConfig) -> Spec:
        """Return the spec with the command line that repeats the prune in its provenance."""
        command = command_of(model, config, self.dtype, self.text)
        return replace(spec, provenance={**spec.provenance, "command": command})
