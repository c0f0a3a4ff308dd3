"""Registry of the backbone families."""

from __future__ import annotations

from ovsprune.core.protocols import Family
from ovsprune.core.registry import Registry

__all__ = ["FAMILIES"]

FAMILIES: Registry[Family] = Registry("backbone family", "ovsprune.backbones")
