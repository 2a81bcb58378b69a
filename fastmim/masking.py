"""Mask samplers: which patches each sample loses, as a pure function of (seed, epoch, position)."""

from dataclasses import dataclass

from torch import Tensor

from fastmim import kernels
from fastmim.config import Config
from fastmim.kernels._masks import masks_from_order


@dataclass(frozen=True)
class Mask:
    """The removed and kept patches of a batch; both id lists ascend, so that reads of the image go forward.

    Attributes:
        ids_keep: int64 [B, K].
        ids_mask: int64 [B, M].
        ids_restore: int64 [B, N], the place of each patch in `cat([ids_keep, ids_mask])`.
        mask: bool [B, N], true where a patch is removed.
    """

    ids_keep: Tensor
    ids_mask: Tensor
    ids_restore: Tensor
    mask: Tensor

    def swapped(self) -> "Mask":
        """The complementary mask: what this one removes is kept."""
        patches, removed = self.ids_restore.shape[1], self.ids_mask.shape[1]
        restore = (self.ids_restore + removed) % patches
        return Mask(self.ids_mask, self.ids_keep, restore, ~self.mask)


def sample_random_mask(seed: int, epochs: Tensor, positions: Tensor, patches: int, keep: int) -> Mask:
    """Keep `keep` patches of each sample, uniformly at random; see `fastmim.kernels.sample_random_mask`.

    Args:
        seed: of the run.
        epochs: int64 [B].
        positions: int64 [B], the samples' positions in their epochs.
        patches: N.
        keep: K, at least 1 and below N.
    """
    return Mask(*kernels.sample_random_mask(seed, epochs, positions, patches, keep))


class MaskSampler:
    """Draws the masks that a configuration asks for.

    Args:
        config: of the run; `mask`, `train.seed` and the patch grid are read.

    Attributes:
        keep: how many patches stay.
    """

    def __init__(self, config: Config):
        self.seed, self.grid, self.options = config.train.seed, config.grid, config.mask
        self.patches = self.grid[0] * self.grid[1]
        self.keep = config.mask.len_keep(self.grid)

    def __call__(self, epochs: Tensor, positions: Tensor) -> Mask:
        """The masks of samples at these epochs and positions, int64 [B] each."""
        where, options = (self.seed, epochs, positions), self.options
        if options.strategy == "random":
            masks = kernels.sample_random_mask(*where, self.patches, self.keep, options.unit, self.grid)
        elif options.strategy == "block":
            masks = kernels.sample_block_mask(
                *where, self.grid, self.keep, options.min_block, options.min_aspect
            )
        else:
            masks = kernels.sample_grid_mask(*where, self.grid, options.random_phase)
        return Mask(*masks)


def mask_from_order(order: Tensor, keep: int) -> Mask:
    """The mask that keeps the first `keep` patches of `order`, int64 [B, N]."""
    return Mask(*masks_from_order(order, keep))
