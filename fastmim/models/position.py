"""Position tables: the fixed 2-d sine-cosine one, and any other for another grid."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(dim: int, grid: tuple[int, int], trained: tuple[int, int] | None = None) -> Tensor:
    """Position table of a patch grid, with a zero row for the cls token.

    The first half of the channels encodes the column, the second the row; within a half, sines come first.
    Computed in float64, so the table does not depend on the platform's float32 functions.

    Args:
        dim: channels, a multiple of 4.
        grid: patches per column and per row (height, width).
        trained: compute the table of this grid instead and resize it to `grid`: the places of a whole image that
            weights have seen, rather than new ones beyond its edge.

    Returns:
        float32 [1, 1 + height * width, dim].

    Source: MAE, appendix A.1 (Vaswani et al., 2017, in two dimensions).
    """
    height, width = trained or grid
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim / 4))
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    table = np.concatenate([np.zeros((1, dim)), table])
    return resize_positions(torch.from_numpy(table)[None], (height, width), grid).to(torch.float32)


def resize_positions(table: Tensor, old: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A position table for another grid: bicubic, antialiased, as timm resizes.

    Args:
        table: [1, 1 + N, D], the first row for the cls token, which stays.
        old: patches per column and row of the table.
        grid: those that are wanted.

    Returns:
        [1, 1 + grid[0] * grid[1], D].
    """
    if old == grid:
        return table
    maps = table[:, 1:].transpose(1, 2).unflatten(2, old)
    maps = F.interpolate(maps, grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)
