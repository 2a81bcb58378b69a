"""Addresses past 2**31 elements: the last programs of a launch that is too large to run as a whole.

Tensors are reserved and not filled: memory is taken for the last sample, and for what else a program touches.
"""

import re
import sys

import pytest
import torch
from fastmim.kernels import _dispatch, sample_block_mask, sample_grid_mask, sample_random_mask
from triton.runtime import interpreter

from benchmarks.compiled import TARGETS, compile_launch, record_launches
from tests.kernels.kernel_testing import constants

# The last of 8193 samples of 257 rows of 1024 values starts 2**31 + 2**23 elements into a tensor.
BATCH, ROWS, WIDTH = 8193, 257, 1024
OPS = torch.ops.fastmim
BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True)
def last_programs(monkeypatch):
    """Interpret the last program of each axis of a grid, and the one before it."""
    builder, launch = interpreter.InterpreterBuilder, _dispatch.launch
    set_place, set_sizes = builder.set_grid_idx, builder.set_grid_dim
    skipped, whole = [0, 0, 0], [1, 1, 1]

    def launch_last(function, grid, *args, **settings):
        grid = (*grid, 1, 1)[:3]
        whole[:] = grid
        skipped[:] = [max(0, size - 2) for size in grid]
        launch(function, tuple(min(2, size) for size in grid), *args, **settings)

    def set_last_place(self, *place):
        set_place(self, *(index + skip for index, skip in zip(place, skipped, strict=True)))

    monkeypatch.setattr(_dispatch, "launch", launch_last)
    monkeypatch.setattr(builder, "set_grid_idx", set_last_place)
    monkeypatch.setattr(builder, "set_grid_dim", lambda self, *sizes: set_sizes(self, *whole))


def reserve(*shape, dtype=BFLOAT16):
    """Memory that is not touched but for the last sample, which is random."""
    tensor = torch.empty(shape, dtype=dtype)
    if dtype == torch.uint8:
        tensor[-1] = torch.randint(0, 256, shape[1:], dtype=dtype)
    else:
        tensor[-1] = torch.randn(shape[1:])
    assert (shape[0] - 1) * tensor.stride(0) >= 2**31
    return tensor


def order(rows=ROWS):
    """One permutation of the rows for all samples, which leaves the last row in its place."""
    return torch.cat([torch.randperm(rows - 1), torch.tensor([rows - 1])]).int().repeat(BATCH, 1)


def vector(*shape):
    return torch.randn(shape).to(BFLOAT16)


def images():
    return reserve(BATCH, 16, 16 * ROWS, 4, dtype=torch.uint8), order(), 16, *constants(4)


HEADS = 22


def queries_keys_values():
    return reserve(BATCH, 64, 3, HEADS, 64)


def rows():
    return reserve(BATCH * ROWS, WIDTH)


# Arguments of an operation, and which of its results to look at. Arguments with BATCH samples, or with one row for
# each row of a sample, are cut to the last for the comparison.
CALLS = {
    "gather_tokens": (lambda: (reserve(BATCH, ROWS, WIDTH), order(), 0), 0),
    "scatter_tokens": (lambda: (reserve(BATCH, ROWS, WIDTH), order(), ROWS, 0), 0),
    "embed_tokens": (
        lambda: (reserve(BATCH, ROWS, WIDTH), vector(1, 1, WIDTH), vector(1, 1 + ROWS, WIDTH), order()),
        0,
    ),
    "unshuffle": (
        lambda: (reserve(BATCH, ROWS, WIDTH), vector(1, 1, WIDTH), vector(1, ROWS, WIDTH), order(ROWS - 1)),
        0,
    ),
    "unshuffle_backward": (
        lambda: (reserve(BATCH, ROWS, WIDTH), order(ROWS - 1), ROWS - 1, BFLOAT16, None),
        0,
    ),
    "gather_patches": (lambda: (*images(), BFLOAT16), 0),
    "masked_pixel_loss": (
        lambda: (reserve(BATCH, ROWS, WIDTH), *images(), True, "mse", True),
        2,
    ),
    "masked_pixel_loss, strided": (
        lambda: (reserve(BATCH, ROWS + 1, WIDTH)[:, 1:], *images(), False, "mse", True),
        2,
    ),
    "add_layer_norm": (lambda: (rows(), rows(), vector(WIDTH), vector(WIDTH), 1e-6), 0),
    "add_layer_norm_backward": (lambda: (rows(), rows(), rows(), vector(WIDTH), 1e-6), 0),
    "bias_gelu": (lambda: (rows(), vector(WIDTH)), 0),
    "bias_gelu_backward": (lambda: (rows(), rows(), vector(WIDTH)), 0),
    "short_attention": (lambda: (queries_keys_values(),), 0),
    "short_attention_backward": (
        lambda: (vector(64, HEADS, 64).expand(BATCH, -1, -1, -1), queries_keys_values()),
        0,
    ),
    "align": (lambda: (rows(), rows(), 1e-6, 1), 1),
    "align, strided": (
        lambda: (reserve(BATCH, 1 + ROWS, WIDTH)[:, 1:], vector(1, 1, WIDTH).expand(BATCH, ROWS, -1), 1e-6, 2),
        1,
    ),
    "scale_gradient": (lambda: (torch.tensor(1.0), rows(), 1, 2.0, BFLOAT16), 0),
}  # fmt: skip


def last_sample(argument):
    if isinstance(argument, torch.Tensor) and argument.ndim and argument.shape[0] in (BATCH, BATCH * ROWS):
        return argument[-1:].clone()
    return argument


@pytest.mark.parametrize("name", CALLS)
def test_the_last_row(monkeypatch, name):
    build, which = CALLS[name]
    arguments, operation = build(), getattr(OPS, name.split(",")[0])
    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    results = operation(*arguments)
    monkeypatch.setattr(_dispatch, "MODE", "reference")
    expected = operation(*map(last_sample, arguments))
    if isinstance(results, tuple):
        results, expected = results[which], expected[which]
    actual, wanted = results[-1].flatten()[-2:], expected[-1].flatten()[-2:]
    assert wanted.count_nonzero() > 0
    torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)


def test_the_last_row_of_the_gradient_of_align(monkeypatch):
    arguments = rows(), rows(), 1e-6, 1
    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    actual = OPS.align_backward(torch.tensor(float(BATCH * ROWS)), *arguments)[-1]
    monkeypatch.setattr(_dispatch, "MODE", "reference")
    (expected,) = OPS.align_backward(torch.tensor(1.0), *map(last_sample, arguments))
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-4)


def test_the_gradient_of_the_positions(monkeypatch):
    grad, ids_restore = reserve(BATCH, ROWS, WIDTH), order(ROWS - 1)
    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    actual = OPS.embed_tokens_position_gradient(grad, ids_restore, BFLOAT16)
    # Of the last token, the columns of the last program.
    exact = grad[:, -1, -8:].float().sum(0)
    torch.testing.assert_close(actual[0, -1, -8:].float(), exact, rtol=1e-2, atol=1e-2)


def test_the_last_row_of_logits():
    module = sys.modules["fastmim.kernels.masked_cross_entropy"]
    logits = reserve(2**18 + 1, 8192)
    labels, per_row = torch.zeros(len(logits), dtype=torch.int64), torch.empty(len(logits))
    expected, expected_row = logits[-1:].float(), torch.empty(1)
    module._softmax_gradient_torch(expected, labels[-1:], expected_row, 1.0, True)
    module._softmax_gradient_triton(logits, labels, per_row, 1.0, True)
    torch.testing.assert_close(per_row[-1:], expected_row)
    torch.testing.assert_close(logits[-1:].float(), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "sample",
    [
        lambda *where: sample_random_mask(*where, 196, 49),
        lambda *where: sample_block_mask(*where, (14, 14), 49),
        lambda *where: sample_grid_mask(*where, (14, 14), True),
    ],
    ids=["random", "block", "grid"],
)
def test_masks_are_written_at_64_bit_offsets(sample):
    """Outputs of 2**31 ids would take 17 GB even untouched, so the compiler's own types are read."""
    with record_launches() as launches:
        sample(0, torch.arange(2), torch.arange(2))
    code = compile_launch(launches[0], TARGETS["sm_90"]).asm["ttir"]
    # A sample's place is a scalar; what is added to it in 32 bits is a patch.
    places = re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (\w+)", code)
    assert len(places) >= 4 and set(places) == {"i64"}
