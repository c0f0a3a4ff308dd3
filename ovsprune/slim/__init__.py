"""Slim checkpoints: format, writing, reading, attaching to a model, and loading.

Reading and attaching need torch and safetensors only; see ``docs/format.md``.
"""

from ovsprune.slim.apply import apply
from ovsprune.slim.attach import Applied
from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.clip import load_open_clip
from ovsprune.slim.load import SlimTower, load
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.spec import SlimSpec
from ovsprune.slim.write import write

__all__ = [
    "Applied",
    "SlimAttention",
    "SlimCheckpoint",
    "SlimSpec",
    "SlimTower",
    "apply",
    "load",
    "load_open_clip",
    "read",
    "write",
]
