"""Random masks: exact counts, uniform, and a function of seed, epoch and position alone."""

import numpy as np
import pytest
import torch
from fastmim.kernels import _dispatch
from fastmim.kernels.philox import philox_4x32
from scipy.stats import chi2

from fastmim import kernels
from fastmim.masking import MaskSampler, mask_from_order, sample_random_mask


def sample(positions, epochs=None, seed=0, patches=49, keep=12):
    positions = torch.as_tensor(positions)
    epochs = torch.zeros_like(positions) if epochs is None else torch.as_tensor(epochs)
    return sample_random_mask(seed, epochs, positions, patches, keep)


def test_philox_gives_the_published_known_answers():
    # Random123's kat_vectors for philox4x32, 10 rounds.
    zero = philox_4x32(0, np.zeros(1, np.int64), 0, 0, 0)
    assert [int(word[0]) for word in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    full = 0xFFFFFFFF
    ones = philox_4x32(2**64 - 1, torch.tensor([full]), full, full, full)
    assert [int(word) for word in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = philox_4x32(
        0x299F31D0_A4093822,
        np.array([0x243F6A88]),
        np.int64(0x85A308D3),
        np.int64(0x13198A2E),
        np.int64(0x03707344),
    )
    assert [int(word[0]) for word in pi] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_ids_partition_the_patches():
    mask = sample(range(64), patches=197, keep=49)
    both = torch.cat([mask.ids_keep, mask.ids_mask], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(197).expand(64, -1))
    assert torch.equal(both.gather(1, mask.ids_restore), torch.arange(197).expand(64, -1))
    assert (mask.ids_keep.diff(dim=1) > 0).all() and (mask.ids_mask.diff(dim=1) > 0).all()
    assert torch.equal(mask.mask.sum(1), torch.full((64,), 197 - 49))
    assert not mask.mask.gather(1, mask.ids_keep).any()


def test_a_mask_does_not_depend_on_its_batch():
    together = sample(range(100))
    alone = sample([37])
    shuffled = sample([5, 99, 37, 2])
    assert torch.equal(together.ids_keep[37], alone.ids_keep[0])
    assert torch.equal(together.ids_keep[37], shuffled.ids_keep[2])


def test_the_kernel_draws_the_mask_of_plain_pytorch(monkeypatch):
    plain = sample(range(30), epochs=range(30))
    launched, launch = [], _dispatch.launch
    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    monkeypatch.setattr(
        _dispatch, "launch", lambda *args, **kwargs: (launched.append(args[0]), launch(*args, **kwargs))
    )
    mask = sample(range(30), epochs=range(30))
    assert len(launched) == 1
    assert torch.equal(mask.ids_keep, plain.ids_keep)
    assert torch.equal(mask.ids_mask, plain.ids_mask)
    assert torch.equal(mask.ids_restore, plain.ids_restore)


def test_mask_from_order_keeps_the_first():
    mask = mask_from_order(torch.tensor([[3, 0, 4, 1, 2], [1, 2, 0, 4, 3]]), keep=2)
    assert mask.ids_keep.tolist() == [[0, 3], [1, 2]]
    assert mask.ids_mask.tolist() == [[1, 2, 4], [0, 3, 4]]
    assert mask.ids_restore.tolist() == [[0, 2, 3, 1, 4], [2, 0, 1, 3, 4]]
    assert mask.mask.tolist() == [[False, True, True, False, True], [True, False, False, True, True]]


def test_seed_epoch_and_position_all_matter():
    first = sample([3]).ids_keep
    assert not torch.equal(first, sample([4]).ids_keep)
    assert not torch.equal(first, sample([3], epochs=[1]).ids_keep)
    assert not torch.equal(first, sample([3], seed=1).ids_keep)
    assert not torch.equal(first, sample([3 + 2**32]).ids_keep)


def test_every_patch_is_kept_equally_often():
    # Kept counts per position: K of N without replacement, so the chi-square statistic shrinks by (N - K) / (N - 1).
    samples, patches, keep = 20_000, 49, 12
    kept = sample(range(samples), patches=patches, keep=keep).ids_keep.flatten().bincount(minlength=patches)
    expected = samples * keep / patches
    statistic = (((kept - expected) ** 2) / expected).sum().item() * (patches - 1) / (patches - keep)
    assert statistic < chi2.ppf(0.9999, patches - 1)


STRATEGIES = {
    "random": ("mask.ratio=0.6",),
    "units": ("mask.unit=2", "mask.ratio=0.5"),
    "block": ("mask.strategy=block", "mask.ratio=0.4", "mask.min_block=4", "mask.min_aspect=0.5"),
    "grid": ("mask.strategy=grid", "mask.random_phase=true"),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_sampler_draws_what_the_configuration_asks_for(tiny_config, name):
    config = tiny_config("train.seed=5", "data.image_size=[64,96]", *STRATEGIES[name])
    sampler, (rows, columns) = MaskSampler(config), (8, 12)
    epochs, positions = torch.zeros(50, dtype=torch.int64), torch.arange(50)
    mask = sampler(epochs, positions)
    where = 5, epochs, positions
    expected = {
        "random": lambda: kernels.sample_random_mask_reference(*where, 96, 38),
        "units": lambda: kernels.sample_random_mask_reference(*where, 96, 48, 2, (8, 12)),
        "block": lambda: kernels.sample_block_mask_reference(*where, (8, 12), 57, 4, 0.5),
        "grid": lambda: kernels.sample_grid_mask_reference(*where, (8, 12), True),
    }
    outputs = (mask.ids_keep, mask.ids_mask, mask.ids_restore, mask.mask)
    assert all(map(torch.equal, outputs, expected[name]()))
    assert mask.ids_keep.shape == (50, sampler.keep)
    assert (mask.mask.sum(1) == rows * columns - sampler.keep).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_draw_the_masks_of_their_own_samples(tiny_config, name):
    sampler = MaskSampler(tiny_config("data.image_size=[64,96]", *STRATEGIES[name]))
    epochs, positions = torch.arange(12) // 5, torch.arange(12)
    whole = sampler(epochs, positions).mask
    parts = [sampler(epochs[rank::3], positions[rank::3]).mask for rank in range(3)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)
    assert len({tuple(row.tolist()) for row in whole}) == (12 if name != "grid" else 4)


def test_a_swapped_mask_keeps_what_was_removed():
    mask = sample(range(5), patches=20, keep=7)
    swapped = mask.swapped()
    assert torch.equal(swapped.ids_keep, mask.ids_mask) and torch.equal(swapped.mask, ~mask.mask)
    both = torch.cat([swapped.ids_keep, swapped.ids_mask], dim=1)
    assert torch.equal(both.gather(1, swapped.ids_restore), torch.arange(20).expand(5, -1))
