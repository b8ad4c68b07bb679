"""Let the process keep the memory that it frees."""

from __future__ import annotations

import ctypes
import gc
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 1024 * 1024  # glibc accepts no more
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks for the next allocation instead of unmapping them.

    Gradients and copies of weights are freed and allocated anew at every step; fresh pages have
    to be cleared by the kernel, which costs a quarter of a step of a small model on a CPU.

    Returns
    -------
    bool
        Whether the C library took the setting; elsewhere than on glibc there is nothing to set.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, _NEVER)
    )


def give_back_memory() -> None:
    """Return to the system what `keep_freed_memory` kept, between two stages of a long run."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
