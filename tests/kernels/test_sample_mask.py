import pytest
import torch
from fastmim.kernels import sample_random_mask, sample_random_mask_reference
from fastmim.kernels.philox import STREAM_MASK, philox_4x32
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from tests.kernels.kernel_testing import INDEX_DTYPES, exact_outputs

SIZES = [(2, 1), (3, 2), (49, 12), (196, 49), (197, 196), (256, 64), (1023, 1), (4096, 1024)]
# Positions whose noise ties between two of 1024 units, and how many units that splits.
UNIT_TIES = [(9775, 150), (12101, 1023), (13744, 126)]
SEEDS = [0, 1, 7, 2**40 + 3, 2**63 - 1]


def coordinates(samples=4, dtype=torch.int64):
    """Epochs and positions at the ends of their ranges, then ordinary ones."""
    epochs, positions = [0, 2**32 - 1, *range(samples)], [2**56 - 1, 2**32, *range(samples)]
    if dtype == torch.int32:
        epochs, positions = epochs[2:], positions[2:]
    return torch.tensor(epochs, dtype=dtype), torch.tensor(positions, dtype=dtype)


def exact_mask(seed, epoch, position, patches, keep, unit=1, columns=1):
    """One sample's mask, from Python integers, unit by unit."""
    units = {}
    for n in range(patches):
        units.setdefault((n // columns // unit, n % columns // unit), []).append(n)
    last_word = STREAM_MASK | position >> 32 << 8
    noise = [
        philox_4x32(seed, index, position & 0xFFFFFFFF, epoch, last_word)[0] for index in range(len(units))
    ]
    members = [units[place] for place in sorted(units)]
    order = [n for index in sorted(range(len(units)), key=lambda i: (noise[i], i)) for n in members[index]]
    return exact_outputs(order[:keep], order[keep:])


@pytest.mark.parametrize("seed", SEEDS)
def test_ids_are_those_of_the_definition(backend, unwritten_shows, seed):
    epochs, positions = coordinates()
    masks = sample_random_mask(seed, epochs, positions, 23, 7)
    for sample, (epoch, position) in enumerate(zip(epochs.tolist(), positions.tolist(), strict=True)):
        expected = exact_mask(seed, epoch, position, 23, 7)
        assert [output[sample].tolist() for output in masks] == expected


UNITS = [(2, 4, 2, 4), (6, 4, 2, 4), (9, 6, 3, 45), (14, 14, 2, 76), (14, 14, 7, 49), (4, 32, 4, 64)]


@pytest.mark.parametrize(("rows", "columns", "unit", "keep"), UNITS)
def test_units_are_those_of_the_definition(backend, unwritten_shows, rows, columns, unit, keep):
    epochs, positions = coordinates()
    masks = sample_random_mask(5, epochs, positions, rows * columns, keep, unit, (rows, columns))
    for sample, (epoch, position) in enumerate(zip(epochs.tolist(), positions.tolist(), strict=True)):
        expected = exact_mask(5, epoch, position, rows * columns, keep, unit, columns)
        assert [output[sample].tolist() for output in masks] == expected


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize(("patches", "keep"), SIZES)
def test_bits_are_the_references(backend, unwritten_shows, patches, keep, dtype):
    epochs, positions = coordinates(dtype=dtype)
    masks = sample_random_mask(3, epochs, positions, patches, keep)
    expected = sample_random_mask_reference(3, epochs, positions, patches, keep)
    assert all(map(torch.equal, masks, expected))
    assert [output.dtype for output in masks] == [torch.int64] * 3 + [torch.bool]


@pytest.mark.parametrize(("position", "keep"), [(46, 3519), (1681, 1178), (2185, 237)])
def test_equal_noise_at_the_threshold_keeps_the_lower_index(backend, position, keep):
    counter = torch.arange(4096), position, 0, STREAM_MASK
    noise, order = philox_4x32(0, *counter)[0].sort(stable=True)
    assert noise[keep - 1] == noise[keep]
    ids_keep, *_ = sample_random_mask(0, torch.tensor([0]), torch.tensor([position]), 4096, keep)
    assert order[keep - 1] in ids_keep
    assert order[keep] not in ids_keep


@pytest.mark.parametrize(("position", "keep"), UNIT_TIES)
def test_equal_noise_at_the_threshold_splits_no_unit(backend, position, keep):
    noise, order = philox_4x32(0, torch.arange(1024), position, 0, STREAM_MASK)[0].sort(stable=True)
    assert noise[keep - 1] == noise[keep]
    arguments = torch.tensor([0]), torch.tensor([position]), 4096, 4 * keep, 2, (64, 64)
    *_, mask = sample_random_mask(0, *arguments)
    units = mask.view(32, 2, 32, 2).sum((1, 3)).flatten()
    assert set(units.tolist()) == {0, 4}
    assert units[order[keep - 1]] == 0 and units[order[keep]] == 4


@pytest.mark.parametrize("patches", [16, 196])
def test_dozens_of_samples_agree_whatever_their_batch(backend, patches):
    positions = torch.arange(36)
    epochs = positions % 5
    together = sample_random_mask(11, epochs, positions, patches, patches // 4)
    expected = sample_random_mask_reference(11, epochs, positions, patches, patches // 4)
    subset = torch.tensor([35, 2, 17])
    apart = sample_random_mask(11, epochs[subset], positions[subset], patches, patches // 4)
    for ids, reference, some in zip(together, expected, apart, strict=True):
        assert torch.equal(ids, reference)
        assert torch.equal(ids[subset], some)


def test_strided_epochs_and_positions(backend):
    epochs, positions = coordinates()
    expected = sample_random_mask(5, epochs, positions, 16, 4)
    pairs = torch.stack([epochs, positions], 1)
    assert all(map(torch.equal, sample_random_mask(5, pairs[:, 0], pairs[:, 1], 16, 4), expected))
    shared = sample_random_mask(5, torch.tensor(2).expand(3), torch.arange(3), 16, 4)
    assert all(
        map(torch.equal, shared, sample_random_mask(5, torch.tensor([2, 2, 2]), torch.arange(3), 16, 4))
    )


def test_seeds_are_64_bits_signed_or_not(backend):
    where = torch.tensor([0]), torch.tensor([9]), 49, 12
    ids = {
        seed: sample_random_mask(seed, *where)[0] for seed in (-1, 2**64 - 1, 2**32 - 1, -(2**63), 2**63, 0)
    }
    assert torch.equal(ids[-1], ids[2**64 - 1])
    assert torch.equal(ids[-(2**63)], ids[2**63])
    assert len({tuple(row.flatten().tolist()) for row in ids.values()}) == 4


def test_every_patch_is_kept_equally_often():
    # Kept counts per position: K of N without replacement, so the statistic shrinks by (N - K) / (N - 1).
    samples, patches, keep = 20_000, 64, 16
    positions = torch.arange(samples)
    ids_keep, *_ = sample_random_mask_reference(2, positions // 7, positions, patches, keep)
    kept = ids_keep.flatten().bincount(minlength=patches)
    expected = samples * keep / patches
    statistic = (((kept - expected) ** 2) / expected).sum().item() * (patches - 1) / (patches - keep)
    assert chi2.ppf(0.0001, patches - 1) < statistic < chi2.ppf(0.9999, patches - 1)


def test_every_unit_is_kept_equally_often():
    samples, units, keep = 20_000, 16, 4
    positions = torch.arange(samples)
    arguments = (4, positions // 7, positions, 4 * units, 4 * keep, 2, (8, 8))
    *_, mask = sample_random_mask_reference(*arguments)
    kept = (~mask).view(samples, 8, 8)[:, ::2, ::2].sum(0)
    expected = samples * keep / units
    statistic = (((kept - expected) ** 2) / expected).sum().item() * (units - 1) / (units - keep)
    assert chi2.ppf(0.0001, units - 1) < statistic < chi2.ppf(0.9999, units - 1)


# The backend is set once for all examples, and no example changes it.
SAME_BACKEND = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SAME_BACKEND
@given(data=st.data())
def test_masks_are_permutations_with_exactly_k_kept(backend, data):
    patches = data.draw(st.integers(2, 300), "patches")
    keep = data.draw(st.integers(1, patches - 1), "keep")
    seed = data.draw(st.integers(-(2**63), 2**64 - 1), "seed")
    epochs = torch.tensor([data.draw(st.integers(0, 2**32 - 1), "epoch")])
    positions = torch.tensor([data.draw(st.integers(0, 2**56 - 1), "position")])
    ids_keep, ids_mask, ids_restore, mask = sample_random_mask(seed, epochs, positions, patches, keep)
    assert ids_keep.shape == (1, keep)
    assert torch.equal(mask.nonzero()[:, 1], ids_mask[0])
    both = torch.cat([ids_keep, ids_mask], 1)
    assert torch.equal(both.sort(1).values, torch.arange(patches)[None])
    assert torch.equal(both.gather(1, ids_restore), torch.arange(patches)[None])
    assert (ids_keep.diff() > 0).all() and (ids_mask.diff() > 0).all()


def test_opcheck(backend):
    epochs, positions = coordinates()
    torch.library.opcheck(torch.ops.fastmim.sample_random_mask.default, (3, epochs, positions, 16, 4, 2, 8))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(backend, compiler, dynamic):
    def step(epochs, positions):
        ids_keep, *others = sample_random_mask(3, epochs, positions + 1, 16, 4, 2, (2, 8))
        return ids_keep * 2, *others

    compiled = compiler(step, dynamic=dynamic)
    for samples in (1, 4):
        arguments = coordinates(samples)
        arguments = arguments[0][1:], arguments[1][1:]
        assert all(map(torch.equal, compiled(*arguments), step(*arguments)))


def test_the_kernel_refuses_more_patches_than_its_registers_hold(backend):
    where = torch.tensor([0]), torch.tensor([0])
    if backend == "reference":
        assert sample_random_mask(0, *where, 4097, 5)[0].shape == (1, 5)
    else:
        with pytest.raises(ValueError, match=r"patches is 4097; the Triton kernel takes up to 4096, plain"):
            sample_random_mask(0, *where, 4097, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": torch.zeros(2)}, TypeError, r"epochs has dtype float32; wanted int64 or int32"),
        ({"epochs": torch.zeros(3).long()}, ValueError, r"epochs has shape \[3\]; wanted \[B\] = \[2\]"),
        ({"epochs": torch.zeros(2, device="meta").long()}, ValueError, r"epochs is on meta; wanted cpu"),
        (
            {"epochs": torch.tensor([0, 2**32])},
            ValueError,
            r"epochs has values 0\.\.4294967296; wanted 0\.\.",
        ),
        ({"epochs": torch.tensor([0, -1])}, ValueError, r"epochs has values -1\.\.0; wanted 0\.\.4294967295"),
        ({"positions": [1, 2]}, TypeError, r"positions is a list; wanted a tensor \[B\]"),
        ({"positions": torch.zeros(2, 1).long()}, ValueError, r"positions has shape \[2, 1\]; wanted \[B\]"),
        ({"positions": torch.tensor([0, 2**56])}, ValueError, r"positions has values 0\.\.72057594037927936"),
        (
            {"positions": torch.zeros(0).long(), "epochs": torch.zeros(0).long()},
            ValueError,
            r"positions has shape \[0\]; wanted at least one sample",
        ),
        ({"patches": 1}, ValueError, r"patches is 1; wanted 2\.\.1048575"),
        ({"patches": 2**20}, ValueError, r"patches is 1048576; wanted 2\.\.1048575"),
        ({"keep": 0}, ValueError, r"keep is 0; wanted 1\.\.15, as there are 16 patches"),
        ({"keep": 16}, ValueError, r"keep is 16; wanted 1\.\.15, as there are 16 patches"),
        ({"unit": 0}, ValueError, r"unit is 0; wanted 1 or more"),
        ({"unit": 2}, ValueError, r"grid is None with unit 2; wanted \(rows, columns\)"),
        ({"unit": 2, "grid": (4, 8)}, ValueError, r"grid is 4 x 8; wanted 16 patches"),
        ({"unit": 3, "grid": (4, 4)}, ValueError, r"grid is 4 x 4; wanted multiples of unit 3"),
        (
            {"unit": 2, "grid": (4, 4), "keep": 6},
            ValueError,
            r"keep is 6; wanted a multiple of 4, the patches of a unit",
        ),
        ({"seed": 2**64}, ValueError, r"seed is 18446744073709551616; wanted a 64-bit integer"),
    ],
)
def test_errors_name_argument_got_and_wanted(change, error, message):
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = {"seed": 0, "epochs": zeros, "positions": zeros, "patches": 16, "keep": 4}
    with pytest.raises(error, match=message):
        sample_random_mask(**(arguments | change))
