"""Third-party frameworks that can take a slim tower; one file for each.

``TARGETS.get("mmseg-san").attach(model, ovsprune.read("slim/..."))`` slims a live model;
:func:`load_into` loads the output of ``ovsprune transfer`` into a freshly built one.
"""

from __future__ import annotations

from ovsprune.targets.attached import Attached
from ovsprune.targets.convert import Converted
from ovsprune.targets.masked import mask_tower
from ovsprune.targets.output import load_into
from ovsprune.targets.protocol import Target
from ovsprune.targets.registry import TARGETS, apply_compat

__all__ = ["TARGETS", "Attached", "Converted", "Target", "apply_compat", "load_into", "mask_tower"]
