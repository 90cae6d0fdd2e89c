"""Give memory back to the system that the C library would keep.

glibc holds freed tensors of some megabytes in a heap, in whose holes the next ones rarely fit. On
other C libraries nothing is done.
"""

from __future__ import annotations

import ctypes
from typing import Any

# Of glibc's malloc.h: how much may stay free at the top of the heap. Setting it also stops glibc
# from raising the size, 128 KiB at first, from which an allocation is mapped for itself.
_TRIM_THRESHOLD = -1
_FREE_AT_TOP = 64 * 2**20


def unmap_when_freed() -> bool:
    """Let this process return every freed tensor of more than 128 KiB to the system at once.

    A training step on a CPU takes a tenth longer by it. It stays so until the process ends.

    Returns:
        False where the C library is not glibc, and nothing was changed.
    """
    library = _c_library()
    return library is not None and bool(library.mallopt(_TRIM_THRESHOLD, _FREE_AT_TOP))


def give_back() -> None:
    """Return to the system what is free in the heap now, from its top and from its holes."""
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


def _c_library() -> Any:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, "malloc_trim") else None
