import functools

import pytest
import torch
from fastmim.kernels.align import cosine_align, cosine_align_reference, mse_align, mse_align_reference

from tests.kernels.kernel_testing import DTYPES, assert_error_budget

plain_align = functools.partial(mse_align, normalise=False)
plain_align_reference = functools.partial(mse_align_reference, normalise=False)

# 2-D and 3-D, widths on both sides of a power of two, more rows than a program takes
SHAPES = [(1, 1), (37, 96), (2, 5, 7), (197, 3), (3, 4, 768), (5, 1280), (1, 1023, 8), (196, 49)]


def exact_mse(x, target):
    """CAE's formula in float64, row by row."""
    rows = []
    for ours, theirs in zip(x.flatten(0, -2), target.double().flatten(0, -2), strict=True):
        centred = [row - row.sum() / row.numel() for row in (ours, theirs)]
        ours, theirs = (row / (row.square().sum() / row.numel() + 1e-6).sqrt() for row in centred)
        rows.append((ours - theirs).square().sum() / ours.numel())
    return torch.stack(rows).sum() / len(rows), torch.stack(rows).view(x.shape[:-1])


def exact_plain(x, target):
    per_row = (x - target.double()).square().sum(-1) / x.shape[-1]
    return per_row.sum() / per_row.numel(), per_row


def exact_cosine(x, target):
    """CAE v2's formula in float64; no row here is shorter than eps."""
    target = target.double()
    norms = x.square().sum(-1).sqrt() * target.square().sum(-1).sqrt()
    per_row = 1 - (x * target).sum(-1) / norms
    return per_row.sum() / per_row.numel(), per_row


LOSSES = pytest.mark.parametrize(
    ("function", "reference", "exact"),
    [
        (mse_align, mse_align_reference, exact_mse),
        (plain_align, plain_align_reference, exact_plain),
        (cosine_align, cosine_align_reference, exact_cosine),
    ],
    ids=["mse", "plain", "cosine"],
)


def setup(*shape, dtype=torch.float32):
    x = torch.randn(*shape) * 2 + 0.5
    return x.to(dtype), (x + torch.randn(*shape)).to(dtype)


def run(function, x, target, dtype, scale=1.0):
    x = x.detach().to(dtype).requires_grad_()
    loss, per_row = function(x, target)
    (grad,) = torch.autograd.grad(loss * scale, x)
    return loss.detach(), per_row.detach(), grad


@LOSSES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(backend, unwritten_shows, function, reference, exact, shape, dtype):
    x, target = setup(*shape, dtype=dtype)
    # The scale plays the part of fp16 loss scaling and keeps small gradients out of float16's subnormals.
    actual = run(function, x, target, dtype, scale=1000.0)
    native = run(reference, x, target, dtype, scale=1000.0)
    truth = run(exact, x, target, torch.float64, scale=1000.0)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert actual[1].shape == x.shape[:-1]
    # A cosine is of order one however small 1 - cos is, and a difference of float32 rows likewise.
    for got, expected, wanted in zip(actual[:2], native[:2], truth[:2], strict=True):
        assert_error_budget(got + 1, expected + 1, wanted + 1)
    if shape[-1] == 1 and function is not plain_align:
        # LayerNorm of one column is zero and its cosine is a sign: the gradient is rounding around zero.
        torch.testing.assert_close(actual[2].double(), truth[2], rtol=0, atol=1e-3)
    else:
        # Interpreted, float32 is cut to bfloat16: at most one eps of a value, whatever PyTorch's error is.
        floor = torch.finfo(dtype).eps if backend == "interpret" and dtype == torch.bfloat16 else 4e-6
        assert_error_budget(actual[2], native[2], truth[2], floor=floor)


@LOSSES
def test_strided_inputs(backend, unwritten_shows, function, reference, exact):
    x, target = setup(3, 5, 20)
    expected = run(reference, x, target, torch.float32)
    for change in (
        lambda t: torch.cat([t[:, :2], t], 1)[:, 2:],
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        for strided in ((change(x), target), (x, change(target)), (change(x), change(target))):
            torch.testing.assert_close(run(function, *strided, torch.float32), expected)
    flat = x.flatten(0, 1), target.flatten(0, 1).T.contiguous().T
    loss, per_row, grad = run(function, *flat, torch.float32)
    torch.testing.assert_close((loss, per_row.view(3, 5), grad.view(3, 5, 20)), expected)


@LOSSES
def test_offsets_beyond_int32(backend, function, reference, exact):
    # Rows 2^30 elements apart in memory that is reserved and, but for three rows, never touched.
    x, target = setup(3, 8)
    memory = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=x.device)
    far = memory.as_strided((3, 8), (2**30, 1))
    far.copy_(x)
    expected = run(reference, target, x.bfloat16(), torch.float32)
    torch.testing.assert_close(run(function, target, far, torch.float32), expected)
    far = far.requires_grad_()
    (grad,) = torch.autograd.grad(function(far, target)[0], far)
    wanted = run(reference, x.bfloat16(), target, torch.bfloat16)[2]
    torch.testing.assert_close(grad, wanted, rtol=2**-6, atol=1e-4)


@LOSSES
def test_mixed_dtypes(backend, unwritten_shows, function, reference, exact):
    x, target = setup(7, 96)
    loss, per_row, grad = run(function, x.bfloat16(), target, torch.bfloat16)
    assert loss.dtype == per_row.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, run(reference, x.bfloat16(), target, torch.bfloat16)[0])


def test_layer_norm_ignores_scale_and_shift(backend):
    x, _ = setup(7, 96)
    loss, _ = mse_align(x * 3 + 100, x)
    assert loss < 1e-6
    assert cosine_align(x * 3, x)[0] < 1e-6


@LOSSES
def test_equal_rows_have_no_loss_and_no_gradient(backend, function, reference, exact):
    x, _ = setup(7, 96)
    loss, _, grad = run(function, x, x, torch.float32)
    assert loss.abs() < 1e-6
    assert grad.abs().max() < 1e-6


@LOSSES
def test_a_constant_row_is_finite(backend, function, reference, exact):
    x, target = setup(3, 96)
    x[1] = 0
    actual, native = (run(f, x, target, torch.float32) for f in (function, reference))
    assert all(tensor.isfinite().all() for tensor in actual)
    torch.testing.assert_close(actual, native)


def test_rows_shorter_than_eps_are_divided_by_eps(backend):
    x, target = setup(4, 96)
    x[1] *= 1e-9
    target[2] *= 1e-9
    x[3], target[3] = x[3] * 1e-8, x[3] * 1e-8
    actual, native = (run(f, x, target, torch.float32) for f in (cosine_align, cosine_align_reference))
    torch.testing.assert_close(actual, native)


@LOSSES
def test_float16_gradient_survives_at_training_size(backend, function, reference, exact):
    x, target = setup(4, 768, dtype=torch.float16)
    x.requires_grad_()
    loss, _ = function(x, target)
    (plain,) = torch.autograd.grad(loss * 2.0**-30, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 2.0**-30 * 2.0**30, x)
    assert plain.count_nonzero() == 0
    truth = run(exact, x, target, torch.float64)[2]
    torch.testing.assert_close(scaled.double(), truth, rtol=2**-9, atol=2**-16)


@LOSSES
def test_target_is_a_constant(backend, function, reference, exact):
    x, target = setup(3, 8)
    x.requires_grad_(), target.requires_grad_()
    loss, per_row = function(x, target)
    assert not per_row.requires_grad
    assert torch.autograd.grad(loss, target, allow_unused=True, retain_graph=True) == (None,)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not function(x.detach(), target)[0].requires_grad


@LOSSES
def test_same_result_under_autocast(backend, function, reference, exact):
    arguments = setup(7, 96)
    expected = function(*arguments)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = function(*arguments)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@LOSSES
def test_reference_is_exact_and_differentiable(function, reference, exact):
    x, target = (tensor.double() for tensor in setup(2, 3, 5))
    truth = exact(x, target)
    x.requires_grad_()
    for candidate in (reference, function):
        torch.testing.assert_close(tuple(candidate(x, target)), truth, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(lambda x, f=candidate: f(x, target)[0], x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
@pytest.mark.parametrize("compare", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_opcheck(backend, shape, compare):
    x, target = setup(*shape)
    torch.library.opcheck(torch.ops.fastmim.align.default, (x.requires_grad_(), target, 1e-6, compare))
    grad = torch.tensor(0.5)
    strided = x.detach().mT.contiguous().mT
    torch.library.opcheck(torch.ops.fastmim.align_backward.default, (grad, strided, target, 1e-6, compare))


@LOSSES
def test_compiles_without_graph_breaks(backend, compiler, function, reference, exact):
    def step(x, target):
        loss, per_row = function(x * 2, target)
        return loss * 3, per_row

    compiled = compiler(step, dynamic=True)
    for rows in (2, 3):
        x, target = setup(rows, 5, 8)
        x.requires_grad_()
        loss, per_row = step(x, target)
        compiled_loss, compiled_per_row = compiled(x, target)
        expected, actual = (torch.autograd.grad(value, x)[0] for value in (loss, compiled_loss))
        torch.testing.assert_close((actual, compiled_loss, compiled_per_row), (expected, loss, per_row))


@pytest.mark.parametrize("function", [mse_align, cosine_align])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x is a list; wanted a tensor \[R, D\]"),
        ({"x": torch.zeros(4, 8).long()}, TypeError, r"x has dtype int64; wanted float32"),
        ({"x": torch.zeros(8)}, ValueError, r"x has shape \[8\]; wanted \[R, D\]"),
        ({"x": torch.zeros(2, 2, 8)}, ValueError, r"target has shape \[4, 8\]; wanted \[B, M, D\]"),
        ({"target": torch.zeros(4, 8).int()}, TypeError, r"target has dtype int32; wanted float32"),
        ({"target": torch.zeros(1, 8)}, ValueError, r"target has shape \[1, 8\]; .* = \[4, 8\]"),
        ({"target": torch.zeros(4, 8, device="meta")}, ValueError, r"target is on meta; wanted cpu"),
        ({"x": torch.zeros(0, 8), "target": torch.zeros(0, 8)}, ValueError, r"x .* wanted at least one row"),
        ({"eps": 0.0}, ValueError, r"eps is 0\.0; wanted a positive number"),
    ],
)
def test_errors_name_argument_got_and_wanted(function, change, error, message):
    with pytest.raises(error, match=message):
        function(**({"x": torch.zeros(4, 8), "target": torch.zeros(4, 8)} | change))
