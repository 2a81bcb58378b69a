"""Grid masks: one patch of each 2 x 2 is kept, the same one everywhere in an image."""

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
    launch_sampler,
    masks_from_kept,
    new_masks,
    sample_words,
    store_masks,
)
from ._operation import operation
from .philox import STREAM_GRID


def sample_grid_mask_reference(
    seed: int, epochs: Tensor, positions: Tensor, grid: tuple[int, int], random_phase: bool = False
) -> Masks:
    """Keep the patches whose row and column have the sample's parities. epochs, positions [B] -> see `Masks`."""
    rows, columns = grid
    phase = torch.zeros_like(positions, dtype=torch.int64)[:, None]  # 0..3
    if random_phase:
        phase = draw_words(seed, epochs, positions, phase[:1, 0], STREAM_GRID)[0] >> 30
    patch = torch.arange(rows * columns, device=positions.device)
    kept = (patch // columns % 2 == phase >> 1) & (patch % columns % 2 == phase & 1)
    return masks_from_kept(kept, rows * columns // 4)


@kernel
def _sample_grid_mask_kernel(
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
    columns,
    RANDOM_PHASE: tl.constexpr,
    STREAM: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    phase = tl.full([], 0, tl.int32)
    if RANDOM_PHASE:
        word, _, _, _ = sample_words(
            seed, epochs, positions, stride_epochs, stride_positions, sample, phase, STREAM
        )
        phase = (word >> 30).to(tl.int32)
    kept = (patch // columns & 1 == phase >> 1) & (patch % columns & 1 == (phase & 1)) & (patch < PATCHES)
    store_masks(kept, patch, sample, PATCHES, keep, ids_keep, ids_mask, ids_restore, mask)


@operation("sample_grid_mask")
def _sample_grid_mask(
    seed: int, epochs: Tensor, positions: Tensor, rows: int, columns: int, random_phase: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_values(epochs, positions)
    if not _dispatch.use_triton(positions):
        return sample_grid_mask_reference(seed, epochs, positions, (rows, columns), random_phase)
    return launch_sampler(
        _sample_grid_mask_kernel,
        seed,
        epochs,
        positions,
        rows * columns,
        rows * columns // 4,
        columns,
        per_thread=8,  # with 16 the addresses of the outputs are spilled
        RANDOM_PHASE=random_phase,
        STREAM=STREAM_GRID,
    )


@_sample_grid_mask.register_fake
def _(
    seed: int, epochs: Tensor, positions: Tensor, rows: int, columns: int, random_phase: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_masks(positions, rows * columns, rows * columns // 4)


def sample_grid_mask(
    seed: int, epochs: Tensor, positions: Tensor, grid: tuple[int, int], random_phase: bool = False
) -> Masks:
    """Keep one patch of each 2 x 2: a regular grid of a quarter of the patches.

    Args:
        seed: 64-bit integer, signed or unsigned.
        epochs: [B] int64 or int32, any stride, 0 to 2**32 - 1.
        positions: [B] int64 or int32, any stride, 0 to 2**56 - 1: the samples' positions in their epochs.
        grid: rows and columns of the patches, both even; N = rows * columns is at most 2**20 - 1, in the Triton
            kernel at most 4096.
        random_phase: which patch of the four stays is drawn for each sample; otherwise it is the first.

    Returns:
        ids_keep [B, N / 4], ids_mask [B, 3 N / 4] and ids_restore [B, N], int64, and mask [B, N], bool, as of
        `sample_random_mask`.

    Raises:
        TypeError: epochs or positions of another dtype.
        ValueError: no samples; sizes, devices or values outside those above (values: see `_dispatch`).

    Source: the grid-wise sampling of MAE (He et al., CVPR 2022, Table 1f).
    """
    rows, columns = grid
    if rows < 2 or columns < 2 or rows % 2 or columns % 2:
        raise ValueError(f"grid is {rows} x {columns}; wanted even sides, 2 or more")
    signed = check_sampler(seed, epochs, positions, rows * columns, rows * columns // 4)
    return _sample_grid_mask(signed, epochs, positions, rows, columns, random_phase)
