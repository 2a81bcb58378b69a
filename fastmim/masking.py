"""Mask samplers: which patches each sample loses, as a pure function of (seed, epoch, position)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmim.kernels.philox import STREAM_MASK, philox_4x32


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
    """Keep `keep` patches of each sample, uniformly at random (MAE, section 3).

    Each patch draws one Philox word; the `keep` smallest stay. Equal words are ordered by the patch's index, so
    every device agrees bit for bit.

    Args:
        seed: of the run.
        epochs: int64 [B].
        positions: int64 [B], the samples' positions in their epochs.
        patches: N.
        keep: K, at least 1 and below N.
    """
    patch = torch.arange(patches, device=positions.device)
    position, high = positions[:, None] & 0xFFFFFFFF, positions[:, None] >> 32
    noise = philox_4x32(seed, patch, position, epochs[:, None], STREAM_MASK | (high << 8))[0]
    order = ((noise << 20) | patch).argsort(dim=1)  # [B, N]; N < 2**20
    return mask_from_order(order, keep)


def mask_from_order(order: Tensor, keep: int) -> Mask:
    """The mask that keeps the first `keep` patches of `order`, int64 [B, N]."""
    ids_keep, ids_mask = order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values
    ids = torch.cat([ids_keep, ids_mask], dim=1)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return Mask(ids_keep, ids_mask, torch.empty_like(ids).scatter_(1, ids, places))
