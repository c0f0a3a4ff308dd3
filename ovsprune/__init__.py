"""ovsprune: prune the image tower of a CLIP-like model once, put it into any framework.

Two jobs, from the command line (``ovsprune prune``, ``ovsprune transfer``) and from Python::

    import ovsprune

    checkpoint = ovsprune.read("slim/ViT-B-16-r0.5")  # what prune wrote
    ovsprune.apply(model.visual, checkpoint)  # your tower, slimmed in place

Names are resolved on first use, so ``import ovsprune`` imports no torch, and a framework's own
environment with torch and safetensors alone can read a slim checkpoint and attach it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ovsprune._version import __version__
from ovsprune.core.errors import OvspruneError

if TYPE_CHECKING:
    from ovsprune.jobs.benchmark import benchmark
    from ovsprune.jobs.compare import compare
    from ovsprune.jobs.evaluate import evaluate
    from ovsprune.jobs.export import export
    from ovsprune.jobs.inspect import inspect
    from ovsprune.jobs.prune import prune
    from ovsprune.jobs.schedule import schedule
    from ovsprune.jobs.transfer import transfer
    from ovsprune.launching.command import launch
    from ovsprune.pruning.config import PruneConfig
    from ovsprune.schedules import TrainPlan
    from ovsprune.slim import SlimCheckpoint, SlimTower, apply, load, load_open_clip, read

__all__ = [
    "OvspruneError",
    "PruneConfig",
    "SlimCheckpoint",
    "SlimTower",
    "TrainPlan",
    "__version__",
    "apply",
    "benchmark",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "launch",
    "load",
    "load_open_clip",
    "prune",
    "read",
    "schedule",
    "transfer",
]

_JOBS = (
    "benchmark", "compare", "evaluate", "export", "inspect", "prune", "schedule", "transfer",
)  # fmt: skip
_SLIM = ("SlimCheckpoint", "SlimTower", "apply", "load", "load_open_clip", "read")

# Public name to the module that has it.
_HOMES = {
    "PruneConfig": "ovsprune.pruning.config",
    "TrainPlan": "ovsprune.schedules",
    "launch": "ovsprune.launching.command",
    **{name: f"ovsprune.jobs.{name}" for name in _JOBS},
    **dict.fromkeys(_SLIM, "ovsprune.slim"),
}


def __getattr__(name: str) -> object:
    """Import the module that has ``name`` on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ovsprune' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
