"""Mask samplers: which patches each sample loses, as a pure function of (seed, epoch, position)."""

from dataclasses import dataclass

from torch import Tensor

from fastmim import kernels
from fastmim.kernels.sample_mask import ids_from_order


@dataclass(frozen=True)
class Mask:
    """The removed and kept patches of a batch; both id lists ascend, so that reads of the image go forward.

    Attributes:
        ids_keep: int64 [B, K].
        ids_mask: int64 [B, M].
        ids_restore: int64 [B, N], the place of each patch in `cat([ids_keep, ids_mask])`.
    """

    ids_keep: Tensor
    ids_mask: Tensor
    ids_restore: Tensor

    @property
    def mask(self) -> Tensor:
        """bool [B, N], true where a patch is removed."""
        return self.ids_restore >= self.ids_keep.shape[1]


def len_keep(patches: int, mask_ratio: float) -> int:
    """Patches that stay (MAE's `int(N * (1 - mask_ratio))`)."""
    return int(patches * (1 - mask_ratio))


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


def mask_from_order(order: Tensor, keep: int) -> Mask:
    """The mask that keeps the first `keep` patches of `order`, int64 [B, N]."""
    return Mask(*ids_from_order(order, keep))
