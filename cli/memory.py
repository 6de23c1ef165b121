"""Memory that PyTorch frees, kept for the next pass by commands that search and train.

Beyond some sizes glibc gives freed memory back to the system at once, and the next pass gets it again, page by page and
cleared: with gradients of some hundred images a good part of the time goes there. Servers don't need it: their passes are too
small for that.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h
_KEPT, _LARGEST = 1 << 28, 1 << 26  # bytes: kept at the end of the heap, and of one block


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
    return all(tell(*option) == 1 for option in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT), (_ARENA_MAX, 1)))
