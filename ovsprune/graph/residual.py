"""The channels of a residual stream as a group: a tower's width, or that of one of its stages.

Everything that writes to the stream and reads from it goes along. Cut is the same as masked: a
channel that is gone is zero wherever the stream is, and the norms over it count it as that.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ovsprune.core.records import Group
from ovsprune.slim.norms import count_gone

__all__ = ["count_cut"]


def count_cut(tower: nn.Module, groups: Iterable[Group]) -> None:
    """Exchange, in place, the layer norms over streams for such as count what will be cut as zero.

    As long as nothing is cut, the outputs stay bit for bit as they are.
    """
    for group in groups:
        for path in group.norms if group.across else ():
            count_gone(tower, path)
