"""What a target is: one third-party framework that can take a slim tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.attach import Applied
from ovsprune.targets.attached import Attached
from ovsprune.targets.check import Weights
from ovsprune.targets.convert import Converted
from ovsprune.targets.hooks import Hook
from ovsprune.targets.layout import Layout

__all__ = ["Target"]


class Target(Protocol):
    """One framework, in one file of its own; nothing is inherited.

    Most are a table (:class:`~ovsprune.targets.framework.TableTarget`).

    Attributes:
        framework: What the framework is, with the version or commit that this was written for.
        takes: Kinds of slim towers that it takes, of :data:`~ovsprune.targets.key_map.KINDS`.
        protects: Canonical name (or what it is) to why the framework needs it as it is.
        trainable: ``fnmatch`` patterns of the framework's parameters that a schedule may touch.
        fallback: Whether it is only meant where no other target knows a model.
        files: Names of files that belong beside the framework's checkpoint and go along with it.
        hooks: Functions of the framework that are exchanged so that it runs, by import path.
    """

    @property
    def framework(self) -> str: ...

    @property
    def takes(self) -> tuple[str, ...]: ...

    @property
    def protects(self) -> Mapping[str, str]: ...

    @property
    def trainable(self) -> tuple[str, ...]: ...

    @property
    def fallback(self) -> bool: ...

    @property
    def files(self) -> tuple[str, ...]: ...

    @property
    def hooks(self) -> tuple[Hook, ...]: ...

    def detect(self, model: nn.Module) -> bool:
        """Whether ``model`` is this framework's."""
        ...

    def towers(self, model: nn.Module) -> dict[str, str]:
        """What is where: part of the image tower (``"blocks 0-8"``) to its path in ``model``.

        Raises:
            TargetError: ``model`` is not this framework's.
        """
        ...

    def tower_names(self, model: nn.Module) -> frozenset[str]:
        """Names of the tensors of the image tower, in the model's own terms.

        Raises:
            TargetError: ``model`` is not this framework's.
        """
        ...

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Names of the tower's parts, in both directions.

        Args:
            names: Keys of the framework's state, which tell where the blocks are split; None for
                the framework's default.
            depth: Blocks of the tower.

        Raises:
            TargetError: ``names`` are not this framework's, or have another number of blocks.
        """
        ...

    def example(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Arguments of one forward pass of ``model`` over one picture, to count its costs on.

        None where they cannot be made without the framework's own data.
        """
        ...

    def prepare(self, model: nn.Module) -> None:
        """Make a copy of ``model`` ready to be run on ``example``, in place.

        Bridges it; and whatever it would do once for many pictures (encoding the classes' names) is
        as good as done.
        """
        ...

    def apply_compat(self, model: nn.Module) -> Applied:
        """Let ``model``, dense or slim, run with today's libraries, in place.

        Attaching and loading do it, too. Without anything to do, nothing is changed.

        Returns:
            What was changed; its ``detach()`` undoes it.
        """
        ...

    def enable_tower_grad(self, model: nn.Module) -> Applied:
        """Let gradients reach the tower of a model in training mode, where they are shut out.

        What freezes parameters is not touched: a schedule sets that.

        Returns:
            What was changed; its ``detach()`` undoes it. Nothing for most frameworks.
        """
        ...

    def check(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> tuple[Weights, str]:
        """Ask whether ``model`` can take the slim tower; touches nothing.

        Returns:
            Which weights it would get (for ``"auto"``: decided here), and why.

        Raises:
            TargetError: It cannot, and why.
        """
        ...

    def attach(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Attached:
        """Put the slim tower into ``model``, in place; make the optimiser afterwards.

        Raises:
            TargetError: ``check`` says no; nothing was changed.
        """
        ...

    def convert(
        self,
        state: Mapping[str, Tensor] | None,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Converted:
        """The framework's saved state with the slim tower in it.

        Args:
            state: The dense state, or None to write CLIP alone.
            checkpoint: The slim checkpoint.
            weights: ``"slim"``, ``"target"`` or ``"auto"``.
            force: Take a checkpoint whose base had random weights, too.

        Raises:
            TargetError: It does not fit.
        """
        ...

    def lines(self, output: str) -> str:
        """Python lines to add to the framework's training script, for an ``output`` directory."""
        ...
