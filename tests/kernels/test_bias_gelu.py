import math

import pytest
import torch
from fastmim.kernels import bias_gelu, bias_gelu_reference

from tests.kernels.kernel_testing import DTYPES, assert_error_budget, rounding_factor

# one row and one column; rows that no program's share divides; widths that no tile's divides
SHAPES = [(1, 1), (1, 1, 96), (1023, 8), (37, 96), (2, 65, 7), (3, 5, 768), (5, 1280)]


def setup(*shape, dtype=torch.float32):
    return (torch.randn(*shape) * 2).to(dtype), torch.randn(shape[-1]).to(dtype)


def exact_bias_gelu(x, bias):
    values = x + bias
    return values * torch.special.erfc(-values / math.sqrt(2)) / 2


def gradients(function, arguments, grad, dtype):
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in arguments]
    out = function(*inputs)
    return out.detach(), torch.autograd.grad(out, inputs, grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(backend, unwritten_shows, shape, dtype):
    arguments = setup(*shape, dtype=dtype)
    grad = torch.randn(shape).to(dtype)
    out, grads = gradients(bias_gelu, arguments, grad, dtype)
    native, native_grads = gradients(bias_gelu_reference, arguments, grad, dtype)
    exact, exact_grads = gradients(exact_bias_gelu, arguments, grad, torch.float64)
    factor = rounding_factor(backend, dtype)
    # Where PyTorch happens to be exact a value rounded once may still be one rounding off.
    floor = max(1e-6, torch.finfo(dtype).eps)
    assert_error_budget(out, native, exact, factor, floor)
    for actual, expected, truth in zip(grads, native_grads, exact_grads, strict=True):
        assert_error_budget(actual, expected, truth, factor, floor)


def test_far_from_zero_it_is_the_identity_or_zero(backend):
    x = torch.tensor([[-1e4, -30.0, 30.0, 1e4]], requires_grad=True)
    out = bias_gelu(x, torch.zeros(4))
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 30.0, 1e4]]))
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


def test_strided_inputs_and_gradients(backend, unwritten_shows):
    arguments = setup(3, 5, 20)
    grad = torch.randn(3, 5, 20)
    out, expected = gradients(bias_gelu_reference, arguments, grad, torch.float32)
    for change in (
        lambda t: torch.cat([t[:, :2], t], 1)[:, 2:],
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        x, bias = change(arguments[0]), arguments[1].repeat_interleave(2)[::2]
        torch.testing.assert_close(bias_gelu(x, bias), out)
        inputs = [tensor.requires_grad_() for tensor in (x, bias)]
        actual = torch.autograd.grad(bias_gelu(*inputs), inputs, change(grad))
        torch.testing.assert_close(actual, expected)
    inputs = [tensor.detach().requires_grad_() for tensor in arguments]
    actual = torch.autograd.grad(bias_gelu(*inputs).sum(), inputs)  # an expanded gradient
    _, expected = gradients(bias_gelu_reference, arguments, torch.ones(3, 5, 20), torch.float32)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16")])
def test_the_result_has_the_dtype_of_x(backend, dtypes):
    kinds = [getattr(torch, dtype) for dtype in dtypes]
    inputs = [t.to(kind).requires_grad_() for t, kind in zip(setup(2, 5, 20), kinds, strict=True)]
    out = bias_gelu(*inputs)
    assert out.dtype == kinds[0]
    # The kernel does not round the bias, nor the sum, to that dtype.
    torch.testing.assert_close(out, bias_gelu_reference(*inputs), rtol=2e-2, atol=2e-2)
    assert [grad.dtype for grad in torch.autograd.grad(out.sum(), inputs)] == kinds


def test_bias_gradient_keeps_float32_precision(backend):
    # 600 gradients of 1 + 2^-7, where GELU's slope is 1: summed in bfloat16 they would stop growing near 512.
    x, bias = torch.full((600, 8), 20.0, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    out = bias_gelu(x, bias.requires_grad_())
    out.backward(torch.full_like(out, 1.0078125))
    assert (bias.grad.double() / (600 * 1.0078125) - 1).abs().max() < 2**-7


def test_the_same_inputs_give_the_same_bits(backend):
    arguments, grad = setup(131, 96), torch.randn(131, 96)
    first, second = (gradients(bias_gelu, arguments, grad, torch.float32) for _ in range(2))
    for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


def test_reference_is_exact_and_differentiable():
    arguments = setup(2, 3, 5, dtype=torch.float64)
    truth = exact_bias_gelu(*arguments)
    inputs = [tensor.requires_grad_() for tensor in arguments]
    for function in (bias_gelu_reference, bias_gelu):
        torch.testing.assert_close(function(*arguments), truth, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_opcheck(backend, shape):
    inputs = [tensor.requires_grad_() for tensor in setup(*shape)]
    torch.library.opcheck(torch.ops.fastmim.bias_gelu.default, tuple(inputs))
    strided = torch.randn(shape).mT.contiguous().mT.bfloat16()
    torch.library.opcheck(
        torch.ops.fastmim.bias_gelu_backward.default, (torch.randn(shape), strided, torch.randn(8))
    )


def test_compiles_without_graph_breaks(backend, compiler):
    def step(x, bias):
        return (bias_gelu(x * 2, bias) ** 2).sum()

    compiled = compiler(step, dynamic=True)
    for rows in (2, 3):
        inputs = [tensor.requires_grad_() for tensor in setup(rows, 5, 8)]
        expected = torch.autograd.grad(step(*inputs), inputs)
        torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x is a list; wanted a tensor \[R, D\]"),
        ({"x": torch.zeros(4, 8).long()}, TypeError, r"x has dtype int64; wanted float32"),
        ({"x": torch.zeros(8)}, ValueError, r"x has shape \[8\]; wanted \[R, D\]"),
        ({"x": torch.zeros(2, 0, 8)}, ValueError, r"x has shape \[2, 0, 8\]; wanted at least one row"),
        ({"bias": None}, TypeError, r"bias is a NoneType; wanted a tensor \[D\]"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \[4\]; wanted \[D\] = \[8\]"),
        ({"bias": torch.zeros(1, 8)}, ValueError, r"bias has shape \[1, 8\]; wanted \[D\]"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, r"bias is on meta; wanted cpu"),
    ],
)
def test_errors_name_argument_got_and_wanted(change, error, message):
    with pytest.raises(error, match=message):
        bias_gelu(**({"x": torch.zeros(4, 8), "bias": torch.zeros(8)} | change))
