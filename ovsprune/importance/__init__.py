"""Criteria: which units matter. One file each; see :class:`ovsprune.core.protocols.Criterion`."""

from ovsprune.core.protocols import Criterion
from ovsprune.core.registry import Registry

CRITERIA: Registry[Criterion] = Registry("criterion", "ovsprune.importance")
