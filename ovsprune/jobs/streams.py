"""``--prune-width`` and ``--prune-stages``: channels of residual streams, offered where asked."""

from __future__ import annotations

from torch import nn

from ovsprune.backbones import FAMILIES
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone, Family, Seed, Streamed
from ovsprune.jobs.settings import Settings
from ovsprune.slim.spec import STREAM_KINDS

__all__ = ["stream_seeds"]


def stream_seeds(
    family: Family, backbone: Backbone, tower: nn.Module, settings: Settings
) -> list[Seed]:
    """Seeds of the streams that ``settings`` ask for; none where they ask for none.

    Args:
        family: Of the backbone.
        backbone: For messages.
        tower: Its rewritten tower.
        settings: What decides the prune.

    Raises:
        OptionError: The family has no such streams, or this tower none that can be cut.
    """
    found: list[Seed] = []
    for kind, option in STREAM_KINDS.items():
        if not getattr(settings, option):
            continue
        flag = f"--{option.replace('_', '-')}"
        if not isinstance(family, Streamed) or family.stream_kind != kind:
            raise OptionError(
                f"{flag}: {backbone.name} is of the family {backbone.family}, which does not offer "
                f"it; the families that do: {', '.join(_families(kind))}. Leave it out"
            )
        seeds = family.streams(tower)
        if all(seed.protected for seed in seeds):
            raise OptionError(
                f"{flag}: {backbone.name} has nothing that it could cut: {seeds[0].protected}; "
                "leave it out"
            )
        found += seeds
    return found


def _families(kind: str) -> list[str]:
    families = {name: FAMILIES.get(name) for name in FAMILIES}
    return [n for n, f in families.items() if isinstance(f, Streamed) and f.stream_kind == kind]
