"""Allocations: how many units each group keeps. One file each.

See :class:`ovsprune.core.protocols.Allocator`.
"""

from ovsprune.core.protocols import Allocator
from ovsprune.core.registry import Registry

ALLOCATIONS: Registry[Allocator] = Registry("allocation", "ovsprune.allocation")
