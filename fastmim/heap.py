"""glibc's heap on a CPU, kept from step to step."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 32 * 2**20
"""Bytes of a block from which on glibc maps it alone; it takes no more."""


def keep_heap() -> None:
    """Let glibc keep what a step frees for the next one, but for blocks of 32 MiB and more.

    It would give free memory at the heap's end back to the system, again and again in a step, and every page that is
    asked for anew costs a fault. What a run holds stays at its peak. Another allocator is left as it is.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def give_heap_back() -> None:
    """Return the pages of free blocks to the system, those in the middle of the heap too."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
