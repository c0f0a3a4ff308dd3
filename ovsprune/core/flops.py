"""Settings under which torch counts the floating-point operations of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["unfused_attention"]


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Disable fused attention kernels while FLOPs are counted.

    torch's counter has no formula for the fused transformer layer and for the flash kernel of some
    CPUs, and would count attention as zero.
    """
    kernels: Any = torch.backends.cuda  # These flags also apply to the CPU.
    fast, flash = torch.backends.mha.get_fastpath_enabled(), kernels.flash_sdp_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    kernels.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        kernels.enable_flash_sdp(flash)
