import math

import pytest
import torch
from fastmim.kernels import sample_block_mask, sample_block_mask_reference
from fastmim.kernels.philox import STREAM_BLOCK, STREAM_BLOCK_FILL, philox_4x32

from tests.kernels.kernel_testing import INDEX_DTYPES, exact_outputs

# rows, columns, keep, min_block, min_aspect
SIZES = [
    (14, 14, 118, 16, 0.3),
    (14, 14, 49, 16, 0.3),
    (7, 7, 1, 16, 0.3),
    (4, 9, 35, 1, 0.5),
    (1, 197, 98, 4, 0.01),
    (33, 31, 512, 30, 1.0),
    (3, 5, 5, 10, 0.3),
]


def exact_blocks(seed, epoch, position, rows, columns, keep, min_block, min_aspect):
    """What blocks remove by Algorithm 1 of BEiT, a cell at a time, in Python integers and floats."""
    low_word, high = position & 0xFFFFFFFF, position >> 32 << 8
    removed, target = set(), rows * columns - keep
    draw = failures = 0
    while len(removed) < target and failures < 10:
        words = philox_4x32(seed, draw, low_word, epoch, STREAM_BLOCK | high)
        left = target - len(removed)
        smallest, largest = sorted([min_block, left])
        area = smallest + words[0] * (largest - smallest + 1) // 2**32
        aspect = math.exp(math.log(min_aspect) * (1 - 2 * (words[1] // 2**24) / 255))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        draw, failures = draw + 1, failures + 1
        if height > rows or width > columns:
            continue
        top = words[2] * (rows - height + 1) // 2**32
        start = words[3] * (columns - width + 1) // 2**32
        block = {(top + i) * columns + start + j for i in range(height) for j in range(width)}
        if 0 < len(block - removed) <= left:
            removed |= block
            failures = 0
    return removed


def exact_mask(seed, epoch, position, rows, columns, keep, *options):
    """One sample's outputs: blocks, then random patches up to the count."""
    low_word, high = position & 0xFFFFFFFF, position >> 32 << 8
    removed = exact_blocks(seed, epoch, position, rows, columns, keep, *options)
    rest = sorted(set(range(rows * columns)) - removed)
    noise = {n: philox_4x32(seed, n, low_word, epoch, STREAM_BLOCK_FILL | high)[0] // 2 for n in rest}
    kept = sorted(rest, key=lambda n: (noise[n], n))[:keep]
    return exact_outputs(kept, sorted(set(range(rows * columns)) - set(kept)))


def call(function, size, positions, epochs=None, seed=3):
    rows, columns, keep, min_block, min_aspect = size
    epochs = torch.zeros_like(positions) if epochs is None else epochs
    return function(seed, epochs, positions, (rows, columns), keep, min_block, min_aspect)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_masks_are_those_of_the_definition(backend, unwritten_shows, size, dtype):
    epochs, positions = torch.tensor([[0, 5], [7, 6], [2**31 - 1, 2**31 - 1]], dtype=dtype).T
    masks = call(sample_block_mask, size, positions, epochs)
    assert [output.dtype for output in masks] == [torch.int64] * 3 + [torch.bool]
    for sample, (epoch, position) in enumerate(zip(epochs.tolist(), positions.tolist(), strict=True)):
        assert [output[sample].tolist() for output in masks] == exact_mask(3, epoch, position, *size)


@pytest.mark.parametrize(("seed", "epoch", "position"), [(2**64 - 1, 2**32 - 1, 2**56 - 1), (-1, 1, 2**32)])
def test_the_ends_of_the_ranges(backend, seed, epoch, position):
    where = torch.tensor([position]), torch.tensor([epoch])
    masks = call(sample_block_mask, SIZES[0], *where, seed)
    assert [output[0].tolist() for output in masks] == exact_mask(seed, epoch, position, *SIZES[0])


def test_the_kernel_agrees_with_the_reference_over_many_samples(backend):
    positions = torch.arange(12)
    masks = call(sample_block_mask, SIZES[0], positions, positions % 3)
    assert all(map(torch.equal, masks, call(sample_block_mask_reference, SIZES[0], positions, positions % 3)))
    some = torch.tensor([11, 2, 7])
    apart = call(sample_block_mask, SIZES[0], positions[some], (positions % 3)[some])
    assert all(torch.equal(output[some], alone) for output, alone in zip(masks, apart, strict=True))


def neighbours(mask):
    """Pairs of removed patches that touch, per sample, of bool [B, rows, columns]."""
    return (mask[:, 1:] & mask[:, :-1]).sum((1, 2)) + (mask[:, :, 1:] & mask[:, :, :-1]).sum((1, 2))


@pytest.mark.parametrize(("keep", "factor"), [(118, 2.1), (98, 1.7), (49, 1.2)])
def test_masks_are_blocks_that_reach_everywhere(keep, factor):
    samples, removed = 1000, 196 - keep
    *_, mask = call(sample_block_mask_reference, (14, 14, keep, 16, 0.3), torch.arange(samples))
    assert (mask.sum(1) == removed).all()
    mask = mask.view(samples, 14, 14)
    # Of the 364 pairs of neighbours, a random mask removes both with this probability.
    random_pairs = 364 * removed * (removed - 1) / (196 * 195)
    assert neighbours(mask).float().mean() > factor * random_pairs
    rate = mask.float().mean(0)
    assert rate.min() > 0.02 and rate.max() < 0.999
    assert rate[5:9, 5:9].mean() > rate[0].mean() > rate[0, 0]
    # No side, row or column is preferred.
    for other in (rate.flip(0), rate.flip(1), rate.T):
        assert (rate - other).abs().max() < 0.07


def test_few_patches_are_left_to_chance():
    """BEiT's sampler, which stops where this one fills, falls short by under one patch of 78 on average."""
    counts = [len(exact_blocks(0, 0, position, *SIZES[0])) for position in range(300)]
    assert 77 < sum(counts) / len(counts) < 78


def test_where_no_block_fits_all_patches_are_random(backend):
    positions = torch.arange(8)
    *_, mask = call(sample_block_mask, (1, 40, 20, 16, 0.5), positions)
    assert (mask.sum(1) == 20).all()
    assert len({tuple(row.tolist()) for row in mask}) == 8
    assert neighbours(mask.view(8, 1, 40)).float().mean() < 13


def test_seed_epoch_and_position_all_matter(backend):
    def drawn(position, epoch=0, seed=0):
        return call(sample_block_mask, SIZES[0], torch.tensor([position]), torch.tensor([epoch]), seed)[0]

    others = [drawn(4), drawn(3, epoch=1), drawn(3, seed=1), drawn(3 + 2**32)]
    assert not any(torch.equal(drawn(3), other) for other in others)


def test_strided_epochs_and_positions(backend):
    pairs = torch.arange(8).view(4, 2)
    expected = call(sample_block_mask, SIZES[3], pairs[:, 1].contiguous(), pairs[:, 0].contiguous())
    assert all(map(torch.equal, call(sample_block_mask, SIZES[3], pairs[:, 1], pairs[:, 0]), expected))


def test_opcheck(backend):
    where = torch.arange(2), torch.arange(2)
    torch.library.opcheck(torch.ops.fastmim.sample_block_mask.default, (3, *where, 4, 5, 8, 4, 0.3))


def test_compiles_without_graph_breaks(backend, compiler):
    def step(positions):
        ids_keep, *others = call(sample_block_mask, SIZES[3], positions + 1)
        return ids_keep * 2, *others

    compiled = compiler(step, dynamic=True)
    for samples in (1, 3):
        assert all(map(torch.equal, compiled(torch.arange(samples)), step(torch.arange(samples))))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": (0, 4)}, ValueError, r"grid is 0 x 4; wanted sides of 1 or more"),
        ({"keep": 16}, ValueError, r"keep is 16; wanted 1\.\.15, as there are 16 patches"),
        ({"min_block": 13}, ValueError, r"min_block is 13; wanted 1\.\.12, the patches that are removed"),
        ({"min_block": 0}, ValueError, r"min_block is 0; wanted 1\.\.12"),
        ({"min_aspect": 0.001}, ValueError, r"min_aspect is 0\.001; wanted 0\.01 to 1"),
        ({"min_aspect": 1.5}, ValueError, r"min_aspect is 1\.5; wanted 0\.01 to 1"),
        ({"seed": 2**64}, ValueError, r"seed is 18446744073709551616; wanted a 64-bit integer"),
        ({"positions": torch.zeros(2)}, TypeError, r"positions has dtype float32; wanted int64 or int32"),
        ({"positions": torch.tensor([0, -1])}, ValueError, r"positions has values -1\.\.0; wanted 0\.\."),
    ],
)
def test_errors_name_argument_got_and_wanted(change, error, message):
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = {"seed": 0, "epochs": zeros, "positions": zeros, "grid": (4, 4), "keep": 4, "min_block": 4}
    with pytest.raises(error, match=message):
        sample_block_mask(**(arguments | change))
