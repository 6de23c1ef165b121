"""Memory that PyTorch frees, kept for the next pass by commands that search and train.

Beyond some sizes glibc gives freed memory back to the system at once, and the next pass gets it again, page by page and
cleared: with gradients of some hundred images a good part of the time goes there. Servers don't need it: their passes are too
small for that.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h
_KEPT = 1 << 28  # bytes, at the end of the heap
_LARGEST = (1 << 26, 1 << 25)  # bytes of a block; before 2.35 glibc takes no more than the second


def keep_freed_memory() -> bool:
    """Tell the C library; whatever the user has told it by its environment stands.

    Returns:
        Whether it was told: only glibc can be.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
    except (AttributeError, ValueError):  # other systems know no such name
        return False
    tell = ctypes.CDLL(None).mallopt
    largest = any(tell(_MMAP_THRESHOLD, size) == 1 for size in _LARGEST)
    others = [tell(*option) == 1 for option in ((_TRIM_THRESHOLD, _KEPT), (_ARENA_MAX, 1))]
    return largest and all(others)
