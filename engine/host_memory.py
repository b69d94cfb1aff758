"""How a worker's process gets its memory from the system: once, and then it keeps it.

A step's temporaries are megabytes that are freed at its end. The C library gives such memory back to the system at
once, which hands it out again at the next step, zeroed, page by page: thousands of page faults a step, a sixth of a
decode step over 2,048 tokens. A serving process needs the same memory again a moment later. Knows nothing of the KV
pool, which lies in memory of its own.
"""

from __future__ import annotations

import ctypes

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process reuse what it frees; whether its C library can be told so. What it has freed before is gone.

    One heap, grown and never trimmed, with allocations of any size in it, for all threads that come; one that has
    allocated before keeps its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
    return all(mallopt(name, value) == 1 for name, value in settings)
