"""Block-wise masks: rectangles of patches are removed until the count is reached (BEiT, Algorithm 1).

All arithmetic is on integers, so that the kernel and plain PyTorch agree bit for bit: a random aspect is a product of
fixed-point powers, a block's sides are integer square roots.
"""

import torch
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._masks import (
    Masks,
    check_sampler,
    check_values,
    draw_words,
    keep_lowest,
    launch_sampler,
    masks_from_order,
    new_masks,
    sample_words,
    store_masks,
)
from ._operation import operation
from .philox import STREAM_BLOCK, STREAM_BLOCK_FILL

ATTEMPTS = 10
"""Draws in a row that may fail to place a block before the rest is removed at random (BEiT's value)."""

MIN_ASPECT = 0.01
"""Least `min_aspect`: what the fixed-point powers of an aspect hold."""

_POINT = 24  # bits after the point of an aspect
_LEVEL_BITS = 8  # an aspect is one of 256, evenly spaced in their logarithm
_DRAWS_AT_ONCE = 16


def _fixed_aspects(min_aspect: float) -> tuple[int, int]:
    """The lowest aspect and the ratio of one to the next, up to 1 / min_aspect, in fixed point."""
    ratio = min_aspect ** (-2 / (2**_LEVEL_BITS - 1))
    return round(min_aspect * 2**_POINT), round(ratio * 2**_POINT)


def _below_torch(word: Tensor, bound: Tensor) -> Tensor:
    """Map a 32-bit word to 0..bound-1."""
    return (word * bound) >> 32


def _aspects_torch(words: Tensor, min_aspect: float) -> Tensor:
    """Map 32-bit words to height over width in fixed point."""
    lowest, factor = _fixed_aspects(min_aspect)
    aspects = torch.full_like(words, lowest)
    for bit in range(_LEVEL_BITS):
        taken = (words >> (32 - _LEVEL_BITS + bit) & 1).bool()
        aspects = torch.where(taken, (aspects * factor) >> _POINT, aspects)
        factor = (factor * factor) >> _POINT
    return aspects


def _rounded_root_torch(quadruple: Tensor) -> Tensor:
    """The square root of a quarter, rounded to an integer; exact in float64 below 2**52."""
    return (quadruple.double().sqrt().long() + 1) >> 1


def sample_block_mask_reference(
    seed: int,
    epochs: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    keep: int,
    min_block: int = 16,
    min_aspect: float = 0.3,
) -> Masks:
    """Remove blocks, then random patches. epochs, positions [B] -> see `Masks`."""
    rows, columns = grid
    patch = torch.arange(rows * columns, device=positions.device)
    row, column = patch // columns, patch % columns
    blocked = torch.zeros(len(positions), rows * columns, dtype=torch.bool, device=positions.device)
    left = torch.full_like(positions, rows * columns - keep, dtype=torch.int64)[:, None]
    failures = torch.zeros_like(left)
    draw = 0
    while ((left > 0) & (failures < ATTEMPTS)).any():
        if draw % _DRAWS_AT_ONCE == 0:
            counters = torch.arange(draw, draw + _DRAWS_AT_ONCE, device=positions.device)
            words = draw_words(seed, epochs, positions, counters, STREAM_BLOCK)
            aspects = _aspects_torch(words[1], min_aspect)
        at = slice(draw % _DRAWS_AT_ONCE, draw % _DRAWS_AT_ONCE + 1)
        low, high = left.clamp(max=min_block), left.clamp(min=min_block)
        quadruple = 4 * (low + _below_torch(words[0][:, at], high - low + 1))
        height = _rounded_root_torch((quadruple * aspects[:, at]) >> _POINT)
        width = _rounded_root_torch((quadruple << _POINT) // aspects[:, at])
        top = _below_torch(words[2][:, at], rows - height + 1)
        start = _below_torch(words[3][:, at], columns - width + 1)
        inside = (row >= top) & (row < top + height) & (column >= start) & (column < start + width)
        added = (inside & ~blocked).sum(1, keepdim=True)
        placed = (height <= rows) & (width <= columns) & (added > 0) & (added <= left) & (failures < ATTEMPTS)
        blocked |= inside & placed
        left -= added * placed
        failures = torch.where(placed, 0, failures + 1)
        draw += 1
    noise = draw_words(seed, epochs, positions, patch, STREAM_BLOCK_FILL)[0]
    # Removed patches come last. Equal noise is ordered by the patch's index.
    words = (blocked.long() << 31) | (noise >> 1)
    return masks_from_order(((words << 20) | patch).argsort(dim=1), keep)


@kernel
def _rounded_root(quadruple):
    """The square root of a quarter, rounded to an integer; below 2**22."""
    root = tl.full([], 0, tl.int64)
    bit = tl.full([], 1024, tl.int64)
    for _ in range(11):
        candidate = root | bit
        root = tl.where(candidate * candidate <= quadruple, candidate, root)
        bit = bit >> 1
    return ((root + 1) >> 1).to(tl.int32)


@kernel
def _below(word, bound):
    """Map a 32-bit word to 0..bound-1."""
    return ((word.to(tl.int64) * bound) >> 32).to(tl.int32)


@kernel
def _block_sides(area, word, lowest, factor, POINT: tl.constexpr, LEVEL_BITS: tl.constexpr):
    """Height and width of a block whose aspect is drawn by a 32-bit word."""
    aspect = tl.full([], 0, tl.int64) + lowest
    power = tl.full([], 0, tl.int64) + factor
    level = (word >> (32 - LEVEL_BITS)).to(tl.int32)
    for _ in range(LEVEL_BITS):
        aspect = tl.where((level & 1) == 1, (aspect * power) >> POINT, aspect)
        power = (power * power) >> POINT
        level = level >> 1
    quadruple = area.to(tl.int64) * 4
    return (
        _rounded_root((quadruple * aspect) >> POINT),
        _rounded_root((quadruple << POINT) // aspect),
    )


@kernel
def _sample_block_mask_kernel(
    epochs,
    positions,
    ids_keep,
    ids_mask,
    ids_restore,
    mask,
    seed,
    stride_epochs,
    stride_positions,
    keep,
    rows,
    columns,
    min_block,
    lowest,
    factor,
    ATTEMPTS: tl.constexpr,
    POINT: tl.constexpr,
    LEVEL_BITS: tl.constexpr,
    STREAM: tl.constexpr,
    FILL_STREAM: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    valid = patch < PATCHES
    row, column = patch // columns, patch % columns
    blocked = tl.full([BLOCK], 0, tl.int32)
    left = tl.full([], 0, tl.int32) + PATCHES - keep
    failures = tl.full([], 0, tl.int32)
    draw = tl.full([], 0, tl.int32)
    while (left > 0) & (failures < ATTEMPTS):
        of_area, of_aspect, of_row, of_column = sample_words(
            seed, epochs, positions, stride_epochs, stride_positions, sample, draw, STREAM
        )
        low, high = tl.minimum(left, min_block), tl.maximum(left, min_block)
        area = low + _below(of_area, high - low + 1)
        height, width = _block_sides(area, of_aspect, lowest, factor, POINT, LEVEL_BITS)
        top = _below(of_row, rows - height + 1)
        start = _below(of_column, columns - width + 1)
        inside = (row >= top) & (row < top + height) & (column >= start) & (column < start + width) & valid
        added = tl.sum((inside & (blocked == 0)).to(tl.int32), axis=0)
        placed = (height <= rows) & (width <= columns) & (added > 0) & (added <= left)
        blocked = tl.where(inside & placed, 1, blocked)
        left = tl.where(placed, left - added, left)
        failures = tl.where(placed, 0, failures + 1)
        draw += 1

    noise, _, _, _ = sample_words(
        seed, epochs, positions, stride_epochs, stride_positions, sample, patch, FILL_STREAM
    )
    words = (blocked.to(tl.uint32) << 31) | (noise >> 1)
    kept = keep_lowest(words, patch.to(tl.uint32), valid, keep, INDEX_BITS)
    store_masks(kept, patch, sample, PATCHES, keep, ids_keep, ids_mask, ids_restore, mask)


@operation("sample_block_mask")
def _sample_block_mask(
    seed: int,
    epochs: Tensor,
    positions: Tensor,
    rows: int,
    columns: int,
    keep: int,
    min_block: int,
    min_aspect: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_values(epochs, positions)
    if not _dispatch.use_triton(positions):
        grid = (rows, columns)
        return sample_block_mask_reference(seed, epochs, positions, grid, keep, min_block, min_aspect)
    return launch_sampler(
        _sample_block_mask_kernel,
        seed,
        epochs,
        positions,
        rows * columns,
        keep,
        rows,
        columns,
        min_block,
        *_fixed_aspects(min_aspect),
        ATTEMPTS=ATTEMPTS,
        POINT=_POINT,
        LEVEL_BITS=_LEVEL_BITS,
        STREAM=STREAM_BLOCK,
        FILL_STREAM=STREAM_BLOCK_FILL,
        INDEX_BITS=(rows * columns - 1).bit_length(),
    )


@_sample_block_mask.register_fake
def _(
    seed: int,
    epochs: Tensor,
    positions: Tensor,
    rows: int,
    columns: int,
    keep: int,
    min_block: int,
    min_aspect: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_masks(positions, rows * columns, keep)


def sample_block_mask(
    seed: int,
    epochs: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    keep: int,
    min_block: int = 16,
    min_aspect: float = 0.3,
) -> Masks:
    """Remove rectangles of patches until exactly `keep` are left.

    A block's area is uniform between `min_block` and what is left to remove (in either order), its aspect
    log-uniform, in 256 steps, and its place uniform. It is placed if it fits the grid, removes a patch that is
    still there, and not more than are left to remove. After 10 failures in a row the rest is removed uniformly at
    random: BEiT removes fewer patches in such images, which would leave sequences of different lengths. Where no
    block fits a narrow grid, that is all of them.

    A sample's mask depends on its own arguments only, not on its batch, rank or device.

    Args:
        seed: 64-bit integer, signed or unsigned.
        epochs: [B] int64 or int32, any stride, 0 to 2**32 - 1.
        positions: [B] int64 or int32, any stride, 0 to 2**56 - 1: the samples' positions in their epochs.
        grid: rows and columns of the patches; N = rows * columns is 2 to 2**20 - 1, in the Triton kernel at most
            4096.
        keep: K, 1 to N - 1.
        min_block: area of the smallest block in patches, 1 to N - K.
        min_aspect: least height over width, and width over height, of a block: 0.01 to 1.

    Returns:
        ids_keep [B, K], ids_mask [B, N - K] and ids_restore [B, N], int64, and mask [B, N], bool, as of
        `sample_random_mask`.

    Raises:
        TypeError: epochs or positions of another dtype.
        ValueError: no samples; sizes, devices or values outside those above (values: see `_dispatch`).

    Source: BEiT (Bao et al., ICLR 2022, Algorithm 1); the 10 attempts are those of its public code.
    """
    rows, columns = grid
    if rows < 1 or columns < 1:
        raise ValueError(f"grid is {rows} x {columns}; wanted sides of 1 or more")
    signed = check_sampler(seed, epochs, positions, rows * columns, keep)
    if not 1 <= min_block <= rows * columns - keep:
        raise ValueError(
            f"min_block is {min_block}; wanted 1..{rows * columns - keep}, the patches that are removed"
        )
    if not MIN_ASPECT <= min_aspect <= 1:
        raise ValueError(f"min_aspect is {min_aspect}; wanted {MIN_ASPECT} to 1")
    return _sample_block_mask(signed, epochs, positions, rows, columns, keep, min_block, float(min_aspect))
