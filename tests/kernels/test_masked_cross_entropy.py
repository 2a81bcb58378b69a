import itertools

import pytest
import torch
from fastmim.kernels import _dispatch
from fastmim.kernels.masked_cross_entropy import (
    CACHED_LOGITS,
    CHUNK_LOGITS,
    CHUNK_ROWS,
    _forward,
    chunk_rows,
    masked_cross_entropy,
    masked_cross_entropy_reference,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.kernel_testing import DTYPES, INDEX_DTYPES, assert_error_budget

# In all of these tests 128 rows are a chunk.
pytestmark = pytest.mark.usefixtures("small_chunks")

# rows, columns, classes; 300 rows are three chunks, 8195 classes are two blocks of a row
SHAPES = [
    (1, 1, 5),
    (37, 96, 5),
    (197, 96, 1000),
    (300, 8, 37),
    (3, 768, 8192),
    (2, 16, 8195),
    (4, 3, 1),
    (49, 1280, 33),
]


def setup(rows, columns, classes, dtype=torch.float32, ids_dtype=torch.int64):
    x = torch.randn(rows, columns)
    weight = torch.randn(classes, columns) * (2 / columns**0.5)
    bias = torch.randn(classes)
    labels = torch.randint(0, classes, (rows,), dtype=ids_dtype)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), labels


def exact_loss(x, weight, bias, labels):
    """Negative log-likelihood of a softmax in float64, row by row."""
    losses = []
    for row, label in zip(x, labels, strict=True):
        logits = (weight * row).sum(1)
        logits = logits if bias is None else logits + bias
        largest = logits.detach().max()
        losses.append((logits - largest).exp().sum().log() + largest - logits[label])
    return torch.stack(losses).sum() / len(losses), torch.stack(losses)


def run(function, arguments, dtype, scale=1.0):
    *floats, labels = arguments
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in floats]
    loss, per_row = function(*inputs, labels)
    grads = torch.autograd.grad(loss * scale, [x for x in inputs if x is not None])
    return loss.detach(), per_row.detach(), *grads


def gradient_floor(backend, dtype):
    """Probabilities are rounded to the dtype; cut instead of rounded by the interpreter in bfloat16."""
    eps = torch.finfo(dtype).eps
    return max(4e-6, eps * (2 if backend == "interpret" and dtype == torch.bfloat16 else 1))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"), [*itertools.product(SHAPES, DTYPES), ((1023, 1, 7), torch.bfloat16)]
)
def test_loss_and_gradients(backend, unwritten_shows, shape, dtype, with_bias):
    x, weight, bias, labels = setup(*shape, dtype)
    arguments = x, weight, bias if with_bias else None, labels
    # The scale plays the part of fp16 loss scaling and keeps small gradients out of float16's subnormals.
    actual = run(masked_cross_entropy, arguments, dtype, scale=100.0)
    native = run(masked_cross_entropy_reference, arguments, dtype, scale=100.0)
    exact = run(exact_loss, arguments, torch.float64, scale=100.0)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    for got, expected, wanted in zip(actual[:2], native[:2], exact[:2], strict=True):
        # A logarithm of a sum is of order one however small the loss is.
        assert_error_budget(got + 1, expected + 1, wanted + 1)
    for got, expected, wanted in zip(actual[2:], native[2:], exact[2:], strict=True):
        assert_error_budget(got, expected, wanted, floor=gradient_floor(backend, dtype))


@pytest.mark.parametrize("ids_dtype", INDEX_DTYPES)
def test_strided_inputs(backend, unwritten_shows, ids_dtype):
    x, weight, bias, labels = setup(150, 20, 33, ids_dtype=ids_dtype)
    expected = run(masked_cross_entropy_reference, (x, weight, bias, labels), torch.float32)
    for strided in (
        (x.T.contiguous().T, weight.T.contiguous().T, bias, labels),
        (torch.cat([x, x], 1)[:, :20], weight, bias.repeat_interleave(2)[::2], labels.repeat_interleave(3)[::3]),
        (x.repeat_interleave(2, 1)[:, ::2], weight.repeat(2, 1)[33:], bias, labels),
    ):  # fmt: skip
        torch.testing.assert_close(run(masked_cross_entropy, strided, torch.float32), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_are_in_the_dtype_of_the_rows(backend, dtype):
    x, weight, bias, labels = setup(37, 96, 50)
    x = x.to(getattr(torch, dtype))
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    loss, per_row = masked_cross_entropy(*inputs, labels)
    native, _ = masked_cross_entropy_reference(*inputs, labels)
    assert loss.dtype == per_row.dtype == torch.float32
    torch.testing.assert_close(loss, native)
    grads, expected = (torch.autograd.grad(value, inputs) for value in (loss, native))
    assert [grad.dtype for grad in grads] == [x.dtype, torch.float32, torch.float32]
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0.05, atol=2e-4)


class LargestAllocation(TorchDispatchMode):
    """Records the bytes of the largest storage that any operator returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("needs_grad", [True, False])
def test_logits_never_exist_as_a_whole(backend, needs_grad):
    rows, columns, classes = 700, 8, 1000
    arguments = setup(rows, columns, classes)
    with LargestAllocation() as largest:
        masked_cross_entropy_reference(*arguments)
    assert largest.size == rows * classes * 4
    with LargestAllocation() as largest:
        _forward(*arguments, 1.0, [needs_grad] * 3)
    assert largest.size == 128 * classes * 4


def test_a_chunk_fits_the_cache_where_that_saves_more_than_it_costs(monkeypatch):
    monkeypatch.undo()
    assert chunk_rows(37, 8192, 768) == 37
    # ViT-B, 64 images
    assert chunk_rows(64 * 147, 8192, 768) == 1024
    for shape in ((10**6, 8192, 768), (10**6, 5, 768), (10**5, 9408, 512), (10**5, 10**5, 64)):
        rows = chunk_rows(*shape)
        assert rows % 128 == 0 and rows <= CHUNK_ROWS
        assert rows * shape[1] <= CACHED_LOGITS
    # C-MAE on 8 GPUs of 64 and of 512 images: a chunk of 128 rows would read the keys several times as often.
    for classes, wanted in ((75_264, 1024), (602_112, 384)):
        assert chunk_rows(75_264, classes, 256) == wanted
        assert wanted * classes <= CHUNK_LOGITS
    assert chunk_rows(1000, 10**7, 256) == 128


def test_large_logits_are_finite(backend):
    x, weight, bias, labels = setup(5, 8, 33)
    actual = run(masked_cross_entropy, (x * 1e4, weight, bias, labels), torch.float32)
    native = run(masked_cross_entropy_reference, (x * 1e4, weight, bias, labels), torch.float32)
    assert all(tensor.isfinite().all() for tensor in actual)
    torch.testing.assert_close(actual, native)


def test_float16_gradient_survives_at_training_size(backend):
    x, weight, bias, labels = setup(4, 96, 64, torch.float16)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    loss, _ = masked_cross_entropy(*inputs, labels)
    plain = torch.autograd.grad(loss * 2.0**-30, inputs, retain_graph=True)
    scaled = torch.autograd.grad(loss * 2.0**-30 * 2.0**30, inputs)
    assert all(grad.count_nonzero() == 0 for grad in plain)
    exact = run(exact_loss, (x, weight, bias, labels), torch.float64)[2:]
    for grad, wanted in zip(scaled, exact, strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=2**-7, atol=2**-10)


def test_weight_gradient_keeps_float32_precision_over_chunks(backend):
    # One chunk of ones, then seven whose 0.246 each is below half a step of bfloat16 at their sum of 126.
    rows, classes = 1024, 64
    assert chunk_rows(rows, classes, 1) == 128
    x = torch.full((rows, 1), 2.0**-9, dtype=torch.bfloat16)
    x[:128] = 1
    weight = torch.zeros(classes, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = masked_cross_entropy(x, weight, None, torch.zeros(rows, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, weight)
    wanted = -(1 - 1 / classes) * x.double().sum() / rows
    assert (grad[0, 0].double() / wanted - 1).abs() < 2**-7


@pytest.mark.parametrize(
    ("rows", "weight", "kept"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_what_the_weight_gradient_is_kept_in(backend, rows, weight, kept):
    x, matrix, bias, labels = setup(300, 8, 37)
    arguments = x.to(rows), matrix.to(weight), bias.to(weight), labels, 1.0, [True] * 3
    _, _, _, grad_weight, grad_bias = torch.ops.fastmim.linear_cross_entropy(*arguments)
    assert (grad_weight.dtype, grad_bias.dtype) == (kept, torch.float32)
    assert grad_weight.isfinite().all() and grad_weight.count_nonzero() > 0


def test_gradients_only_where_needed(backend):
    arguments = setup(7, 8, 5)
    op = torch.ops.fastmim.linear_cross_entropy
    for needs in ([True, False, False], [False, True, False], [False, False, True], [False] * 3):
        outputs = op(*arguments, 1.0, needs)
        assert [output.numel() > 0 for output in outputs[2:]] == needs
    x, weight, bias, labels = arguments
    loss, per_row = masked_cross_entropy(x.requires_grad_(), weight, bias, labels)
    assert loss.requires_grad and not per_row.requires_grad
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        assert not masked_cross_entropy(x, weight, bias, labels)[0].requires_grad


def test_same_result_under_autocast(backend):
    arguments = setup(37, 16, 20)
    expected = run(masked_cross_entropy, arguments, torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = run(masked_cross_entropy, arguments, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("with_bias", [True, False])
def test_reference_is_exact_and_differentiable(with_bias):
    *floats, labels = setup(3, 4, 5)
    inputs = [x.double().requires_grad_() for x in (floats if with_bias else floats[:2])]

    for function in (masked_cross_entropy_reference, masked_cross_entropy):

        def apply(x, weight, bias=None, function=function):
            return function(x, weight, bias, labels)

        exact = exact_loss(*inputs[:2], inputs[2] if with_bias else None, labels)
        torch.testing.assert_close(apply(*inputs), exact, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(lambda *x, f=apply: f(*x)[0], inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(backend, with_bias):
    x, weight, bias, labels = setup(7, 8, 5)
    x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    arguments = x, weight, bias if with_bias else None, labels, 0.5, [True, True, with_bias]
    torch.library.opcheck(torch.ops.fastmim.linear_cross_entropy.default, arguments)
    values = torch.tensor(0.5), torch.randn(5, 8), 7, 0.5, torch.bfloat16
    torch.library.opcheck(torch.ops.fastmim.scale_gradient.default, values)


def test_compiles_without_graph_breaks(backend, compiler):
    _, weight, bias, _ = setup(1, 8, 5)
    inputs = [weight.requires_grad_(), bias.requires_grad_()]

    def step(x, weight, bias, labels):
        loss, per_row = masked_cross_entropy(x * 2, weight, bias, labels)
        return loss * 3, per_row

    compiled = compiler(step, dynamic=True)
    for rows in (6, 150):
        x, _, _, labels = setup(rows, 8, 5)
        x.requires_grad_()
        loss, per_row = step(x, *inputs, labels)
        compiled_loss, compiled_per_row = compiled(x, *inputs, labels)
        expected, actual = (torch.autograd.grad(value, [x, *inputs]) for value in (loss, compiled_loss))
        torch.testing.assert_close((actual, compiled_loss, compiled_per_row), (expected, loss, per_row))


def test_float64_is_refused_by_the_kernels(monkeypatch):
    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    x, weight, bias, labels = setup(3, 4, 5, torch.float64)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64; the Triton kernels take float32"):
        masked_cross_entropy(x, weight, bias, labels)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8).long()}, TypeError, r"x has dtype int64; wanted float32"),
        ({"x": torch.zeros(2, 2, 8)}, ValueError, r"x has shape \[2, 2, 8\]; wanted \[R, D\]"),
        ({"x": torch.zeros(0, 8)}, ValueError, r"x has shape \[0, 8\]; wanted at least one row"),
        ({"weight": torch.zeros(5, 8).int()}, TypeError, r"weight has dtype int32; wanted float32"),
        ({"weight": torch.zeros(5, 7)}, ValueError, r"weight has shape \[5, 7\]; .* = \[any, 8\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"weight has shape \[0, 8\]; wanted at least one class"),
        ({"weight": torch.zeros(5, 8, device="meta")}, ValueError, r"weight is on meta; wanted cpu"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \[4\]; wanted \[V\] = \[5\]"),
        ({"bias": torch.zeros(5).int()}, TypeError, r"bias has dtype int32; wanted float32"),
        ({"labels": torch.zeros(4)}, TypeError, r"labels has dtype float32; wanted int64 or int32"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels has shape \[3\]; wanted \[R\] = \[4\]"),
        ({"labels": torch.full((4,), 5)}, ValueError, r"labels has values 5\.\.5; wanted 0\.\.4"),
        ({"labels": torch.full((4,), -1)}, ValueError, r"labels has values -1\.\.-1; wanted 0\.\.4"),
    ],
)
def test_errors_name_argument_got_and_wanted(change, error, message):
    arguments = dict(zip(("x", "weight", "bias", "labels"), setup(4, 8, 5), strict=True))
    with pytest.raises(error, match=message):
        masked_cross_entropy(**(arguments | change))
