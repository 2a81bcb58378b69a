"""What a loss over logits has to move, by arithmetic: chunks of rows, tiles, and the matrix products it waits for.

A loss of R rows of D columns over V classes (or keys) forms R x V logits, and from their gradients those of both sides:
three matrix products of 2 R V D operations.
"""

import math
from dataclasses import dataclass

from fastmim.kernels.masked_cross_entropy import chunk_rows

from benchmarks.rows import BANDWIDTH

MATRIX_SPEED = {"A100": 312e12, "H100": 989e12, "B200": 2250e12}
"""Published bfloat16 operations per second, dense: NVIDIA's data sheets, A100 80GB SXM, H100 SXM, B200 SXM."""

ON_CHIP = 228 * 1024
"""Bytes that one multiprocessor of an H100 or B200 keeps: L1 cache and shared memory."""


@dataclass(frozen=True)
class Logits:
    """One loss: `rows` x `columns` against `classes` x `columns`, both in bfloat16 or, with `item` 4, float32."""

    rows: int
    columns: int
    classes: int
    item: int = 2

    @property
    def chunks(self) -> int:
        """Chunks of rows that the forward pass takes."""
        return math.ceil(self.rows / chunk_rows(self.rows, self.classes, self.columns))

    @property
    def floor(self) -> int:
        """Both sides and their gradients once, int64 labels, a float32 loss per row."""
        return 2 * (self.rows + self.classes) * self.columns * self.item + 12 * self.rows

    @property
    def logits_bytes(self) -> int:
        """Five passes: written by a product, read and overwritten by the kernel, read by two products."""
        return 5 * self.rows * self.classes * self.item

    @property
    def weight_bytes(self) -> int:
        """Per chunk the weight is read twice and its gradient written; further chunks read, add to and write a sum."""
        values, s = self.classes * self.columns, self.item
        # The sum is float32: of several chunks, the first is converted, and bfloat16's last is written as such.
        convert = (s + 4) if s < 4 and self.chunks > 1 else 0
        last = (4 - s) if self.chunks > 1 else 0
        return values * (3 * s * self.chunks + convert + (8 + s) * (self.chunks - 1) - last)

    @property
    def chunked_bytes(self) -> int:
        """What the forward pass moves, gradients included, if nothing stays on the chip between launches."""
        # Rows are read by two products and their gradient is written; the mean reads the losses once more.
        return (
            self.logits_bytes + self.weight_bytes + 3 * self.rows * self.columns * self.item + 16 * self.rows
        )

    @property
    def tiled_bound(self) -> float:
        """The least that any tiling of the first product alone moves between a multiprocessor and the rest.

        A product of R x D by D x V that keeps S values at a time moves at least about 2 R D V / sqrt(S).
        Source: Hong and Kung, STOC 1981; the constant of Smith, Lowery, Langou and van de Geijn, 2019.
        """
        return 2 * self.rows * self.columns * self.classes / math.sqrt(ON_CHIP / self.item) * self.item

    def product_seconds(self, gpu: str) -> float:
        """The three matrix products at the published speed."""
        return 6 * self.rows * self.columns * self.classes / MATRIX_SPEED[gpu]

    def memory_seconds(self, gpu: str, logits_cached: bool) -> float:
        """The forward pass's bytes at the published bandwidth; a chunk's logits may stay in the L2 cache."""
        moved = self.chunked_bytes - (self.logits_bytes if logits_cached else 0)
        return moved / BANDWIDTH[gpu]
