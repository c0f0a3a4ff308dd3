"""Protocol of a target, a third-party framework that can take a slim tower."""

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
    """Framework that can take a slim tower. Each target is one file; there is no base class.

    Most targets are tables (:class:`~ovsprune.targets.framework.TableTarget`).

    Attributes:
        framework: Name of the framework, with the version or commit that the target supports.
        takes: Kinds of slim towers that are accepted, of
            :data:`~ovsprune.targets.key_map.KINDS`.
        protects: Canonical name (or description of a part) to the reason why the framework needs
            it unchanged.
        trainable: ``fnmatch`` patterns of the framework's parameters that a schedule may change.
        fallback: True if the target is used only for models that no other target recognises.
        files: Names of files that accompany the framework's checkpoint and are copied with it.
        hooks: Functions of the framework that are wrapped so that it runs, by import path.
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
        """Return True if ``model`` belongs to this framework."""
        ...

    def towers(self, model: nn.Module) -> dict[str, str]:
        """Return the path in ``model`` of each part of the image tower (``"blocks 0-8"``).

        Like the methods below, raises TargetError if ``model`` belongs to another framework.
        """
        ...

    def tower_names(self, model: nn.Module) -> frozenset[str]:
        """Return the names of the image tower's tensors in ``model``."""
        ...

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Return the names of the tower's tensors, in both directions.

        Args:
            names: Keys of the framework's state dict, which show where the blocks are split; None
                for the framework's default.
            depth: Number of transformer blocks of the tower.

        Raises:
            TargetError: ``names`` belong to another framework or have another number of blocks.
        """
        ...

    def example(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Return the arguments of one forward pass over one image, on which costs are counted.

        None if they cannot be created without data of the framework.
        """
        ...

    def prepare(self, model: nn.Module) -> None:
        """Prepare a copy of ``model`` to be run on ``example``, in place.

        Applies the compatibility fixes, and replaces the results of computations that the framework
        does once for many images (encoding class names), so that their cost is not counted.
        """
        ...

    def apply_compat(self, model: nn.Module) -> Applied:
        """Make ``model``, dense or slim, run with current libraries, in place.

        Attaching and loading call this too. ``detach()`` of the result undoes the changes.
        """
        ...

    def enable_tower_grad(self, model: nn.Module) -> Applied:
        """Let gradients reach a tower that the framework runs without gradients, in training mode.

        ``requires_grad`` is not changed; a schedule sets it. ``detach()`` undoes the changes.
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
        """Check that ``model`` can take the slim tower; change nothing.

        Args:
            model: The framework's model, dense.
            checkpoint: The slim checkpoint.
            weights: ``"slim"``, ``"target"`` (the framework's own, cut by the mask) or ``"auto"``.
            force: Accept a checkpoint whose base model had random weights.

        Returns:
            The weights that it would get (``"auto"`` is resolved here), and the reason.

        Raises:
            TargetError: It cannot take the tower; the message states the reason.
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
        """Replace the tower of ``model`` by the slim one, in place, if ``check`` accepts it.

        The arguments and errors are those of ``check``. Create the optimiser afterwards.
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
        """Return the framework's state dict with the slim tower in it.

        ``state`` is the dense state dict, or None to write CLIP alone. The other arguments and the
        errors are those of ``check``.
        """
        ...

    def lines(self, output: str) -> str:
        """Return the lines to add to the training script, which load the directory ``output``."""
        ...
