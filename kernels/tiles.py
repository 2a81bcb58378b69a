"""How kernels on rows [B, T, D] that share something between samples, such as positions, are cut into programs."""

from . import _dispatch

TILE_ELEMENTS = 8192
"""Elements that a program handles at a time: 32 rows of 256 columns, 32 elements to a thread of `WARPS`."""

WARPS = 8

GROUP_SAMPLES = 64
"""Samples for which one program reads a position. Per sample the decoder's input then reads 2/64 of a row that is
shared (position and mask token) where it moves 1.25 rows of its own, 2.5 %; smaller groups would add programs, of
which a batch of 64 has 394 in ViT-B's decoder, three to a multiprocessor, and cost more bytes."""

PROGRAM_ROWS = 256
"""Rows that a program sums at least: its float32 sum, written and read once, is then 1.3 % of bfloat16 traffic."""


def sample_tile(batch: int, columns: int, elements: int = TILE_ELEMENTS) -> dict[str, int]:
    """Sizes of a tile of tokens x samples x columns, with `elements` elements or fewer.

    One token of 32 samples where the batch has them: a position is read once, and all rows are loaded side by side.
    A smaller batch leaves room for more tokens.
    """
    # Rows that do not start on 16 bytes are loaded value by value, each at an address that takes registers.
    elements = elements if columns % 16 == 0 else elements // 2
    block_columns = _dispatch.column_block(columns)
    samples = min(elements // block_columns, 32, _dispatch.next_power_of_2(batch))
    tokens = elements // (block_columns * samples)
    return {"BLOCK_TOKENS": tokens, "BLOCK_SAMPLES": samples, "BLOCK_COLUMNS": block_columns}


def tile_grid(tile: dict[str, int], tokens: int, columns: int) -> tuple[int, int]:
    """Programs that cover all tokens and columns of one group of samples."""
    return _dispatch.cdiv(tokens, tile["BLOCK_TOKENS"]), _dispatch.cdiv(columns, tile["BLOCK_COLUMNS"])
