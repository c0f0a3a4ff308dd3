"""Counting floating-point operations so that attention counts, whatever kernels a machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["slow_path"]


@contextmanager
def slow_path() -> Iterator[None]:
    """Fused layers and kernels may count attention as nothing; switch them off while counting.

    torch's counter does not know the CPU's flash kernel, which some CPUs have.
    """
    kernels: Any = torch.backends.cuda  # which speaks for the CPU, too
    fast, flash = torch.backends.mha.get_fastpath_enabled(), kernels.flash_sdp_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    kernels.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        kernels.enable_flash_sdp(flash)
