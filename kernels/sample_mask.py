"""Random masks: which patches each sample keeps, as a pure function of (seed, epoch, position)."""

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
from .philox import STREAM_MASK


def sample_random_mask_reference(
    seed: int,
    epochs: Tensor,
    positions: Tensor,
    patches: int,
    keep: int,
    unit: int = 1,
    grid: tuple[int, int] | None = None,
) -> Masks:
    """Keep the K patches of lowest noise, whole units of them. epochs, positions [B] -> see `Masks`."""
    patch = torch.arange(patches, device=positions.device)
    columns = patches if grid is None else grid[1]
    units = patch // columns // unit * (columns // unit) + patch % columns // unit
    noise = draw_words(seed, epochs, positions, units, STREAM_MASK)[0]
    # Equal noise is ordered by the unit's index, so that a unit stays whole and every device agrees bit for bit.
    return masks_from_order(((noise << 20) | units).argsort(dim=1), keep)


@kernel
def _sample_random_mask_kernel(
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
    UNIT: tl.constexpr,
    STREAM: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    unit = patch
    if UNIT > 1:
        unit = patch // columns // UNIT * (columns // UNIT) + patch % columns // UNIT
    unit = unit.to(tl.uint32)
    noise, _, _, _ = sample_words(
        seed, epochs, positions, stride_epochs, stride_positions, sample, unit, STREAM
    )
    kept = keep_lowest(noise, unit, patch < PATCHES, keep, INDEX_BITS)
    store_masks(kept, patch, sample, PATCHES, keep, ids_keep, ids_mask, ids_restore, mask)


@operation("sample_random_mask")
def _sample_random_mask(
    seed: int, epochs: Tensor, positions: Tensor, patches: int, keep: int, unit: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_values(epochs, positions)
    if not _dispatch.use_triton(positions):
        grid = (patches // columns, columns)
        return sample_random_mask_reference(seed, epochs, positions, patches, keep, unit, grid)
    return launch_sampler(
        _sample_random_mask_kernel,
        seed,
        epochs,
        positions,
        patches,
        keep,
        columns,
        UNIT=unit,
        STREAM=STREAM_MASK,
        INDEX_BITS=(patches - 1).bit_length(),
    )


@_sample_random_mask.register_fake
def _(
    seed: int, epochs: Tensor, positions: Tensor, patches: int, keep: int, unit: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_masks(positions, patches, keep)


def _check_units(patches: int, keep: int, unit: int, grid: tuple[int, int] | None) -> None:
    if unit < 1:
        raise ValueError(f"unit is {unit}; wanted 1 or more")
    if grid is None:
        if unit > 1:
            raise ValueError(f"grid is None with unit {unit}; wanted (rows, columns)")
        return
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != patches:
        raise ValueError(f"grid is {rows} x {columns}; wanted {patches} patches")
    if rows % unit or columns % unit:
        raise ValueError(f"grid is {rows} x {columns}; wanted multiples of unit {unit}")
    if keep % unit**2:
        raise ValueError(f"keep is {keep}; wanted a multiple of {unit**2}, the patches of a unit")


def sample_random_mask(
    seed: int,
    epochs: Tensor,
    positions: Tensor,
    patches: int,
    keep: int,
    unit: int = 1,
    grid: tuple[int, int] | None = None,
) -> Masks:
    """Keep `keep` patches of each sample, uniformly at random.

    Each unit of patches draws one Philox word; those of the smallest words stay, of equal words those of lower
    index. A sample's mask depends on its own arguments only, not on its batch, rank or device. Both id lists
    ascend.

    Args:
        seed: 64-bit integer, signed or unsigned.
        epochs: [B] int64 or int32, any stride, 0 to 2**32 - 1.
        positions: [B] int64 or int32, any stride, 0 to 2**56 - 1: the samples' positions in their epochs.
        patches: N, 2 to 2**20 - 1; the Triton kernel takes up to 4096.
        keep: K, 1 to N - 1, a multiple of unit**2.
        unit: patches per side of the squares that are kept or removed as a whole; divides the grid's sides.
        grid: rows and columns of the patches; needed where `unit` is above 1.

    Returns:
        ids_keep [B, K], ids_mask [B, N - K] and ids_restore [B, N], int64; ids_restore holds the place of each
        patch in `cat([ids_keep, ids_mask], 1)`. mask [B, N], bool, is true where a patch is removed.

    Raises:
        TypeError: epochs or positions of another dtype.
        ValueError: no samples; sizes, devices or values outside those above (values: see `_dispatch`).

    Source: the random sampling of MAE (He et al., CVPR 2022, section 3); units: SimMIM (Xie et al., CVPR 2022,
    section 3.2).
    """
    signed = check_sampler(seed, epochs, positions, patches, keep)
    _check_units(patches, keep, unit, grid)
    columns = patches if grid is None else grid[1]
    return _sample_random_mask(signed, epochs, positions, patches, keep, unit, columns)
