"""What the mask samplers share: the draws of a sample, the patches of lowest noise, the four outputs, the checks."""

import torch
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import Kernel, kernel
from .philox import philox_4x32

MAX_PATCHES = 2**20 - 1
MAX_KERNEL_PATCHES = 4096  # a sample stays in the registers of one program
MAX_EPOCHS, MAX_POSITIONS = 2**32, 2**56  # what the counter's words hold

Masks = tuple[Tensor, Tensor, Tensor, Tensor]
"""ids_keep [B, K], ids_mask [B, N - K], ids_restore [B, N], int64, and mask [B, N], bool."""


def draw_words(
    seed: int, epochs: Tensor, positions: Tensor, counters: Tensor, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four Philox words, [B, D] each, of every sample at the counters [D]."""
    positions = positions.long()[:, None]
    last_word = stream | (positions >> 32 << 8)
    return philox_4x32(seed, counters, positions & 0xFFFFFFFF, epochs.long()[:, None], last_word)


def masks_from_kept(kept: Tensor, keep: int) -> Masks:
    """The outputs of a sampler that keeps `keep` patches of each sample, those where bool [B, N] is true."""
    kept_before = kept.cumsum(1) - kept.long()
    patch = torch.arange(kept.shape[1], device=kept.device).expand_as(kept_before)
    restore = torch.where(kept, kept_before, keep + patch - kept_before)
    ids = torch.empty_like(restore).scatter_(1, restore, patch)
    # Clones, since a slice of one row is contiguous, and outputs of an operation must not share memory.
    ids_keep, ids_mask = (
        part.clone(memory_format=torch.contiguous_format) for part in ids.tensor_split([keep], 1)
    )
    return ids_keep, ids_mask, restore, ~kept


def masks_from_order(order: Tensor, keep: int) -> Masks:
    """The outputs of a sampler that keeps the first `keep` patches of `order`, int64 [B, N]."""
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :keep], True)
    return masks_from_kept(kept, keep)


@kernel
def sample_words(
    seed, epochs, positions, stride_epochs, stride_positions, sample, counter, STREAM: tl.constexpr
):
    """Four Philox words of one sample, each of the shape of `counter`."""
    epoch = tl.load(epochs + sample * stride_epochs).to(tl.uint32)
    position = tl.load(positions + sample * stride_positions).to(tl.int64)
    last_word = (STREAM | ((position >> 32) << 8)).to(tl.uint32)
    return tl.philox(seed, counter.to(tl.uint32), position.to(tl.uint32), epoch, last_word)


@kernel
def smallest_word(words, rank, BITS: tl.constexpr):
    """The `rank`-th smallest (from 1) of words below 2**BITS; words above that are never found."""
    # Bit by bit: the largest word that fewer than `rank` words are below. Both id lists ascend, so the order of a
    # sort would be thrown away; counting takes fewer instructions, from registers just the same.
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 1, tl.uint32) << (BITS - 1)
    for _ in range(BITS):
        candidate = threshold | bit
        below = tl.sum((words < candidate).to(tl.int32), axis=0)
        threshold = tl.where(below < rank, candidate, threshold)
        bit = bit >> 1
    return threshold


@kernel
def keep_lowest(words, index, valid, keep, INDEX_BITS: tl.constexpr):
    """Whether a lane is among the `keep` of lowest word, of equal words those of lower index (uint32)."""
    words = tl.where(valid, words, 0xFFFFFFFF)
    threshold = smallest_word(words, keep, 32)
    lower = words < threshold
    equal = valid & (words == threshold)
    spare = keep - tl.sum(lower.to(tl.int32), axis=0)
    last = smallest_word(tl.where(equal, index, 0xFFFFFFFF), spare, INDEX_BITS)
    return lower | (equal & (index <= last))


@kernel
def store_masks(kept, patch, sample, PATCHES: tl.constexpr, keep, ids_keep, ids_mask, ids_restore, mask):
    """Write one sample's outputs; `kept` is false in the lanes past the last patch."""
    valid = patch < PATCHES
    kept_before = tl.cumsum(kept.to(tl.int32), axis=0) - kept.to(tl.int32)
    removed_before = patch - kept_before
    tl.store(ids_keep + sample * keep + kept_before, patch.to(tl.int64), mask=kept)
    removed = valid & (kept == 0)
    tl.store(ids_mask + sample * (PATCHES - keep) + removed_before, patch.to(tl.int64), mask=removed)
    restore = tl.where(kept, kept_before, keep + removed_before)
    tl.store(ids_restore + sample * PATCHES + patch, restore.to(tl.int64), mask=valid)
    tl.store(mask + sample * PATCHES + patch, removed, mask=valid)


def new_masks(like: Tensor, patches: int, keep: int) -> Masks:
    """Outputs to be written, one row per element of `like`."""
    batch = like.shape[0]
    return (
        like.new_empty(batch, keep, dtype=torch.int64),
        like.new_empty(batch, patches - keep, dtype=torch.int64),
        like.new_empty(batch, patches, dtype=torch.int64),
        like.new_empty(batch, patches, dtype=torch.bool),
    )


def launch_sampler(
    function: Kernel,
    seed: int,
    epochs: Tensor,
    positions: Tensor,
    patches: int,
    keep: int,
    *integers: int,
    per_thread: int = 16,
    **constants: int,
) -> Masks:
    """Run a sampler's kernel, one program a sample, `per_thread` patches a thread.

    Raises:
        ValueError: more patches than the registers of a program hold.
    """
    if patches > MAX_KERNEL_PATCHES:
        raise ValueError(
            f"patches is {patches}; the Triton kernel takes up to {MAX_KERNEL_PATCHES}, plain PyTorch "
            f"(FASTMIM_KERNELS=reference) up to {MAX_PATCHES}"
        )
    outputs = new_masks(positions, patches, keep)
    block = _dispatch.next_power_of_2(patches)
    _dispatch.launch(
        function,
        (len(positions),),
        epochs,
        positions,
        *outputs,
        seed,
        epochs.stride(0),
        positions.stride(0),
        keep,
        *integers,
        num_warps=max(1, block // (32 * per_thread)),
        # A constant, so that rows are known to start on 16 bytes wherever N is even.
        PATCHES=patches,
        BLOCK=block,
        **constants,
    )
    return outputs


def check_values(epochs: Tensor, positions: Tensor) -> None:
    """Check the values of a sampler's coordinates, where `_dispatch.check_range` does."""
    _dispatch.check_range("epochs", epochs, 0, MAX_EPOCHS)
    _dispatch.check_range("positions", positions, 0, MAX_POSITIONS)


def check_sampler(seed: int, epochs: Tensor, positions: Tensor, patches: int, keep: int) -> int:
    """Check what every sampler is given, and return the seed as the signed integer that PyTorch passes on."""
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
    # Philox reads the bits, whatever their sign.
    return seed - 2**64 if seed >= 2**63 else seed
