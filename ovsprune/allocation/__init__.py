"""Allocators that choose the number of units each group keeps, one file each.

See :class:`ovsprune.core.protocols.Allocator`.
"""

from ovsprune.core.protocols import Allocator
from ovsprune.core.registry import Registry

ALLOCATIONS: Registry[Allocator] = Registry("allocation", "ovsprune.allocation")
