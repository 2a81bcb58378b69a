import pytest
import torch
from fastmim.kernels import sample_grid_mask, sample_grid_mask_reference
from fastmim.kernels.philox import STREAM_GRID, philox_4x32
from scipy.stats import chi2

from tests.kernels.kernel_testing import INDEX_DTYPES, exact_outputs

GRIDS = [(2, 2), (14, 14), (4, 10), (2, 98), (32, 30)]


def exact_mask(seed, epoch, position, rows, columns, random_phase):
    """One sample's outputs, from Python integers."""
    word = philox_4x32(seed, 0, position & 0xFFFFFFFF, epoch, STREAM_GRID | position >> 32 << 8)[0]
    row, column = divmod(word // 2**30, 2) if random_phase else (0, 0)
    kept = [r * columns + c for r in range(row, rows, 2) for c in range(column, columns, 2)]
    return exact_outputs(kept, sorted(set(range(rows * columns)) - set(kept)))


@pytest.mark.parametrize("random_phase", [False, True])
@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_masks_are_those_of_the_definition(backend, unwritten_shows, grid, dtype, random_phase):
    epochs, positions = torch.tensor([[0, 5], [7, 6], [8, 9], [2**31 - 1, 2**31 - 1]], dtype=dtype).T
    masks = sample_grid_mask(3, epochs, positions, grid, random_phase)
    assert [output.dtype for output in masks] == [torch.int64] * 3 + [torch.bool]
    for sample, (epoch, position) in enumerate(zip(epochs.tolist(), positions.tolist(), strict=True)):
        expected = exact_mask(3, epoch, position, *grid, random_phase)
        assert [output[sample].tolist() for output in masks] == expected


def test_every_phase_comes_equally_often():
    positions = torch.arange(20_000)
    *_, mask = sample_grid_mask_reference(1, positions // 9, positions, (2, 2), random_phase=True)
    kept = (~mask).sum(0)
    assert ((kept - 5000) ** 2 / 5000).sum() < chi2.ppf(0.9999, 3)


def test_a_mask_does_not_depend_on_its_batch(backend):
    positions = torch.arange(30)
    together = sample_grid_mask(0, positions, positions, (4, 6), True)
    some = torch.tensor([29, 3])
    apart = sample_grid_mask(0, positions[some], positions[some], (4, 6), True)
    assert all(torch.equal(output[some], alone) for output, alone in zip(together, apart, strict=True))


def test_opcheck(backend):
    where = torch.arange(3), torch.arange(3)
    torch.library.opcheck(torch.ops.fastmim.sample_grid_mask.default, (3, *where, 4, 6, True))


def test_compiles_without_graph_breaks(backend, compiler):
    def step(positions):
        ids_keep, *others = sample_grid_mask(0, positions, positions + 1, (4, 6), True)
        return ids_keep * 2, *others

    compiled = compiler(step, dynamic=True)
    for samples in (1, 3):
        assert all(map(torch.equal, compiled(torch.arange(samples)), step(torch.arange(samples))))


@pytest.mark.parametrize("grid", [(3, 4), (4, 5), (0, 4)])
def test_odd_sides_are_refused(grid):
    with pytest.raises(ValueError, match=rf"grid is {grid[0]} x {grid[1]}; wanted even sides, 2 or more"):
        sample_grid_mask(0, torch.zeros(1).long(), torch.zeros(1).long(), grid)
