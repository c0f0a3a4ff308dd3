"""Recoveries: how a cut tower is repaired. One file each.

See :class:`ovsprune.core.protocols.Recovery`.
"""

from ovsprune.core.protocols import Recovery
from ovsprune.core.registry import Registry

RECOVERIES: Registry[Recovery] = Registry("recovery", "ovsprune.recovery")
