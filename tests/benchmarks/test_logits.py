"""The losses over logits: counted bytes follow the documented arithmetic, which shows what bounds them."""

import sys

import pytest
import torch
from fastmim.kernels import info_nce, masked_cross_entropy

from benchmarks import rows
from benchmarks.logits import Logits
from benchmarks.readme import problems
from benchmarks.rows import BANDWIDTH

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "chunks"), [(100, 1), (300, 3)])
def test_counted_bytes_are_those_of_the_formula(monkeypatch, dtype, count, chunks):
    monkeypatch.setattr(sys.modules["fastmim.kernels.masked_cross_entropy"], "CHUNK_ROWS", 128)
    ours, theirs = (torch.randn(size, 96, dtype=dtype, requires_grad=True) for size in (count, 512))
    labels = torch.arange(count)
    documented = Logits(count, 96, 512, dtype.itemsize)
    assert documented.chunks == chunks
    for arguments in (
        (masked_cross_entropy, (ours, theirs, None, labels)),
        (info_nce, (ours, theirs, labels, 0.1)),
    ):
        counted = rows.count_passes(*arguments)["forward"].bytes
        assert counted == pytest.approx(documented.chunked_bytes, rel=0.05)


@pytest.mark.parametrize("name", problems())
def test_no_way_to_form_logits_comes_near_the_floor(name):
    """A multiprocessor keeps too little for any order of one of the three products to move 1.3 times the floor."""
    problem = problems()[name]
    assert problem.tiled_bound > 10 * problem.floor
    assert problem.logits_bytes > 9 * problem.floor


@pytest.mark.parametrize("gpu", BANDWIDTH)
@pytest.mark.parametrize("name", problems())
def test_the_matrix_products_take_longer_than_the_memory(name, gpu):
    """On published figures, with a chunk's logits in the L2 cache; on an A100 cross-entropy without that too."""
    problem = problems()[name]
    assert problem.memory_seconds(gpu, logits_cached=True) < problem.product_seconds(gpu)
    if gpu == "A100" and name.startswith("masked_cross_entropy"):
        assert problem.memory_seconds(gpu, logits_cached=False) < problem.product_seconds(gpu)
