"""Equal parts of some rows, and memory that calls share for results of a part, which are not kept.

A heap that is asked for them between tensors that stay has a hole for each when they are freed, and glibc, which aligns
a tensor within a larger block, fills none with one of the same size. Memory that is shared from step to step is not of
the heap at all: there it would lie in the middle of what a step frees.
"""

import mmap
import threading

import torch
from torch import Tensor


class Room(threading.local):
    """One piece of memory for each name and dtype: no two results of one name are needed at a time."""

    def __init__(self):
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width], whose values are those of an earlier call."""
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < rows * width:
            flat = self._flat[name, dtype] = _map(max(1, rows * width), dtype)
        return flat[: rows * width].view(rows, width)


def _map(numbers: int, dtype: torch.dtype) -> Tensor:
    """[numbers] in pages of this process alone."""
    pages = mmap.mmap(-1, numbers * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with torch.inference_mode(False):  # which would have it for itself
        return torch.frombuffer(pages, dtype=dtype)


def equal_parts(rows: int, row_bytes: int, most: int) -> list[slice]:
    """Slices of equal length, of rows of `row_bytes`, no more than `most` bytes each; none of no rows."""
    parts = max(1, -(-rows * row_bytes // most))
    step = max(1, -(-rows // parts))
    return [slice(start, start + step) for start in range(0, rows, step)]
