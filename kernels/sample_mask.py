"""Random masks: which patches each sample keeps, as a pure function of (seed, epoch, position)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from .philox import STREAM_MASK, philox_4x32

MAX_PATCHES = 2**20 - 1
MAX_KERNEL_PATCHES = 4096  # the noise of a sample stays in the registers of one program
MAX_EPOCHS, MAX_POSITIONS = 2**32, 2**56  # what the counter's words hold


def ids_from_order(order: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the first `keep` patches of `order`, int64 [B, N]: (ids_keep, ids_mask, ids_restore), ids ascending."""
    ids_keep, ids_mask = order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values
    ids = torch.cat([ids_keep, ids_mask], dim=1)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return ids_keep, ids_mask, torch.empty_like(ids).scatter_(1, ids, places)


def sample_random_mask_reference(
    seed: int, epochs: Tensor, positions: Tensor, patches: int, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the K patches of lowest noise. epochs, positions [B] -> ids [B, K], [B, N - K] and [B, N]."""
    patch = torch.arange(patches, device=positions.device)
    position, high = positions.long()[:, None] & 0xFFFFFFFF, positions.long()[:, None] >> 32
    noise = philox_4x32(seed, patch, position, epochs.long()[:, None], STREAM_MASK | (high << 8))[0]
    # Equal noise is ordered by the patch's index, so every device agrees bit for bit.
    order = ((noise << 20) | patch).argsort(dim=1)
    return ids_from_order(order, keep)


@kernel
def _sample_random_mask_kernel(
    epochs,
    positions,
    ids_keep,
    ids_mask,
    ids_restore,
    seed,
    stride_epochs,
    stride_positions,
    patches,
    keep,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    epoch = tl.load(epochs + sample * stride_epochs).to(tl.uint32)
    position = tl.load(positions + sample * stride_positions).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    valid = patch < patches
    last_word = (STREAM | ((position >> 32) << 8)).to(tl.uint32)
    noise, _, _, _ = tl.philox(seed, patch.to(tl.uint32), position.to(tl.uint32), epoch, last_word)
    # Lanes past the last patch are the largest, and the last among equals.
    noise = tl.where(valid, noise, 0xFFFFFFFF)

    # The `keep`-th smallest word, bit by bit: the largest word that fewer than `keep` words are below. Both id
    # lists ascend, so the order of a sort would be thrown away; 32 counts of 32-bit words find the threshold in
    # fewer instructions than a sort of 64-bit keys, from registers just the same.
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        below = tl.sum((noise < candidate).to(tl.int32), axis=0)
        threshold = tl.where(below < keep, candidate, threshold)
        bit = bit >> 1
    lower = noise < threshold
    equal = noise == threshold
    spare = keep - tl.sum(lower.to(tl.int32), axis=0)
    kept = lower | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= spare))

    kept_before = tl.cumsum(kept.to(tl.int32), axis=0) - kept.to(tl.int32)
    removed_before = patch - kept_before
    tl.store(ids_keep + sample * keep + kept_before, patch.to(tl.int64), mask=kept & valid)
    removed_at = sample * (patches - keep) + removed_before
    tl.store(ids_mask + removed_at, patch.to(tl.int64), mask=valid & (kept == 0))
    restore = tl.where(kept, kept_before, keep + removed_before)
    tl.store(ids_restore + sample * patches + patch, restore.to(tl.int64), mask=valid)


def _new_ids(like: Tensor, patches: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = like.shape[0]
    return (
        like.new_empty(batch, keep, dtype=torch.int64),
        like.new_empty(batch, patches - keep, dtype=torch.int64),
        like.new_empty(batch, patches, dtype=torch.int64),
    )


def _sample_triton(
    seed: int, epochs: Tensor, positions: Tensor, patches: int, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    if patches > MAX_KERNEL_PATCHES:
        raise ValueError(
            f"patches is {patches}; the Triton kernel takes up to {MAX_KERNEL_PATCHES}, plain PyTorch "
            f"(FASTMIM_KERNELS=reference) up to {MAX_PATCHES}"
        )
    outputs = _new_ids(positions, patches, keep)
    block = triton.next_power_of_2(patches)
    _dispatch.launch(
        _sample_random_mask_kernel,
        (len(positions),),
        epochs,
        positions,
        *outputs,
        seed,
        epochs.stride(0),
        positions.stride(0),
        patches,
        keep,
        num_warps=_dispatch.warps_for(block, 32),
        STREAM=STREAM_MASK,
        BLOCK=block,
    )
    return outputs


@torch.library.custom_op("fastmim::sample_random_mask", mutates_args=())
def _sample_random_mask(
    seed: int, epochs: Tensor, positions: Tensor, patches: int, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    _dispatch.check_range("epochs", epochs, 0, MAX_EPOCHS)
    _dispatch.check_range("positions", positions, 0, MAX_POSITIONS)
    sample = _sample_triton if _dispatch.use_triton(positions) else sample_random_mask_reference
    return sample(seed, epochs, positions, patches, keep)


@_sample_random_mask.register_fake
def _(seed: int, epochs: Tensor, positions: Tensor, patches: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    return _new_ids(positions, patches, keep)


def sample_random_mask(
    seed: int, epochs: Tensor, positions: Tensor, patches: int, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep `keep` patches of each sample, uniformly at random.

    Each patch draws one Philox word; the `keep` smallest stay, of equal words those of lower index. A sample's
    mask depends on its own arguments only, not on its batch, rank or device. Both id lists ascend.

    Args:
        seed: 64-bit integer, signed or unsigned.
        epochs: [B] int64 or int32, any stride, 0 to 2**32 - 1.
        positions: [B] int64 or int32, any stride, 0 to 2**56 - 1: the samples' positions in their epochs.
        patches: N, 2 to 2**20 - 1; the Triton kernel takes up to 4096.
        keep: K, 1 to N - 1.

    Returns:
        ids_keep [B, K], ids_mask [B, N - K] and ids_restore [B, N], int64; ids_restore holds the place of each
        patch in `cat([ids_keep, ids_mask], 1)`.

    Raises:
        TypeError: epochs or positions of another dtype.
        ValueError: no samples; sizes, devices or values outside those above (values: see `_dispatch`).

    Source: the random sampling of MAE (He et al., CVPR 2022, section 3).
    """
    _dispatch.check_tensor("positions", positions, "[B]", _dispatch.INDEX_DTYPES)
    _dispatch.check_tensor("epochs", epochs, "[B]", _dispatch.INDEX_DTYPES, positions.device)
    _dispatch.check_shape("epochs", epochs, "[B]", (positions.shape[0],))
    if positions.shape[0] == 0:
        raise ValueError("positions has shape [0]; wanted at least one sample")
    if not 2 <= patches <= MAX_PATCHES:
        raise ValueError(f"patches is {patches}; wanted 2..{MAX_PATCHES}")
    if not 1 <= keep < patches:
        raise ValueError(f"keep is {keep}; wanted 1..{patches - 1}, as there are {patches} patches")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; wanted a 64-bit integer")
    # PyTorch passes signed 64-bit integers to operations; Philox reads the bits.
    signed = seed - 2**64 if seed >= 2**63 else seed
    return _sample_random_mask(signed, epochs, positions, patches, keep)
