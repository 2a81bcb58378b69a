import pytest
import torch
from fastmim.kernels import add_layer_norm, add_layer_norm_reference

from tests.kernels.kernel_testing import DTYPES, assert_error_budget, rounding_factor

# one row and one column; rows that no program's share divides; widths on both sides of a power of two
SHAPES = [(1, 1), (1, 1, 96), (1023, 8), (37, 96), (2, 65, 7), (3, 5, 768), (5, 1280), (2, 4096)]
NAMES = ("x", "branch", "weight", "bias")


def setup(*shape, dtype=torch.float32):
    x, branch = torch.randn(*shape) * 2 + 0.5, torch.randn(*shape)
    weight, bias = torch.randn(shape[-1]) + 1, torch.randn(shape[-1])
    return tuple(tensor.to(dtype) for tensor in (x, branch, weight, bias))


def exact_add_layer_norm(x, branch, weight, bias, eps=1e-6):
    """Row by row, of the sum as it is given: float64 does not round it."""
    rows = []
    for row in (x + branch).flatten(0, -2):
        centred = row - row.sum() / row.numel()
        rows.append(centred / (centred.square().sum() / row.numel() + eps).sqrt() * weight + bias)
    return torch.stack(rows).view(x.shape), x + branch


def gradients(function, arguments, grads, dtype):
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in arguments]
    out = function(*inputs)
    return [tensor.detach() for tensor in out], torch.autograd.grad(
        out, inputs, [grad.to(dtype) for grad in grads]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(backend, unwritten_shows, shape, dtype):
    arguments = setup(*shape, dtype=dtype)
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    out, inputs_grads = gradients(add_layer_norm, arguments, grads, dtype)
    native, native_grads = gradients(add_layer_norm_reference, arguments, grads, dtype)
    exact, exact_grads = gradients(exact_add_layer_norm, arguments, grads, torch.float64)
    factor = rounding_factor(backend, dtype)
    # Where PyTorch happens to be exact a value rounded once may still be one rounding off.
    floor = max(4e-6, torch.finfo(dtype).eps)
    for actual, expected, truth in zip(out, native, exact, strict=True):
        assert_error_budget(actual, expected, truth, factor, floor)
    assert torch.equal(inputs_grads[0], inputs_grads[1])
    if shape[-1] == 1:
        # A column is its own mean: what passes through the norm is rounding, over a deviation of sqrt(eps).
        noise = (grads[0] * arguments[2]).double().abs().max() * torch.finfo(torch.float32).eps / 1e-3
        for actual, truth in zip(inputs_grads, exact_grads, strict=True):
            assert (actual.double() - truth).abs().max() <= noise + floor * truth.abs().max()
        return
    for actual, expected, truth in zip(inputs_grads, native_grads, exact_grads, strict=True):
        assert_error_budget(actual, expected, truth, factor, floor)


def test_the_sum_is_pytorchs_and_what_is_normalised_is_the_rounded_sum(backend):
    # 2048 + 1.5 is 2050 in float16: a row of such sums and of 2048 + 2 is constant once rounded.
    x, branch, weight, bias = setup(3, 4, 16, dtype=torch.float16)
    x[1], branch[1] = 2048.0, torch.tensor([1.5, 2.0] * 8)
    normed, total = add_layer_norm(x, branch, weight, bias)
    assert torch.equal(total, x + branch)
    torch.testing.assert_close(normed[1], bias.expand(4, 16), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("used", ["normed", "total"])
def test_one_output_alone_may_be_differentiated(backend, unwritten_shows, used):
    arguments = [tensor.requires_grad_() for tensor in setup(2, 5, 20)]
    index = ("normed", "total").index(used)
    grads, expected = (
        torch.autograd.grad(function(*arguments)[index].square().sum(), arguments, allow_unused=True)
        for function in (add_layer_norm, add_layer_norm_reference)
    )
    assert (grads[2] is None) == (grads[3] is None) == (expected[2] is None) == (used == "total")
    for actual, wanted in zip(grads, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted)


def test_both_inputs_share_one_gradient_and_both_leaves_keep_their_own(backend):
    x, branch, weight, bias = setup(2, 5, 20)
    nodes = [tensor.requires_grad_().clone() for tensor in (x, branch)]
    out = add_layer_norm(*nodes, weight, bias)
    shared = torch.autograd.grad(out, nodes, [torch.ones_like(x)] * 2, retain_graph=True)
    assert shared[0].data_ptr() == shared[1].data_ptr()
    for _ in range(2):
        torch.autograd.backward(out, [torch.ones_like(x)] * 2, retain_graph=True)
    for leaf in (x, branch):  # accumulated in place, so they may not be one memory
        torch.testing.assert_close(leaf.grad, 2 * shared[0])


def test_strided_inputs_and_gradients(backend, unwritten_shows):
    arguments = setup(3, 5, 20)
    grads = [torch.randn(3, 5, 20) for _ in range(2)]
    out, expected = gradients(add_layer_norm_reference, arguments, grads, torch.float32)
    for change in (
        lambda t: torch.cat([t[:, :2], t], 1)[:, 2:],
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        x, branch, weight, bias = arguments
        strided = change(x), change(branch), *(t.repeat_interleave(2)[::2] for t in (weight, bias))
        torch.testing.assert_close(list(add_layer_norm(*strided)), out)
        inputs = [tensor.requires_grad_() for tensor in strided]
        actual = torch.autograd.grad(add_layer_norm(*inputs), inputs, [change(grad) for grad in grads])
        torch.testing.assert_close(actual, expected)


def test_expanded_gradient(backend, unwritten_shows):
    arguments = [tensor.requires_grad_() for tensor in setup(2, 5, 20)]
    actual, expected = (
        torch.autograd.grad(sum(out.sum() for out in function(*arguments)), arguments)
        for function in (add_layer_norm, add_layer_norm_reference)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [(("bfloat16", "float32", "float32"), "float32"), (("float16", "float16", "float32"), "float16")],
)
def test_mixed_dtypes_promote_as_in_pytorch(backend, dtypes, result):
    tensors = setup(2, 5, 20)
    kinds = [getattr(torch, dtype) for dtype in (*dtypes, dtypes[2])]
    inputs = [tensor.to(kind).requires_grad_() for tensor, kind in zip(tensors, kinds, strict=True)]
    out, native = add_layer_norm(*inputs), add_layer_norm_reference(*inputs)
    for actual, expected in zip(out, native, strict=True):
        assert str(actual.dtype) == f"torch.{result}"
        # The kernel does not round weight and bias to the result's dtype.
        torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(actual.dtype).eps, atol=4e-3)
    grads = torch.autograd.grad(out[0].sum() + out[1].sum(), inputs)
    assert [grad.dtype for grad in grads] == kinds


def test_parameter_gradients_keep_float32_precision(backend):
    # 600 gradients of 1 + 2^-7: summed in bfloat16 they would stop growing near 512.
    arguments = [tensor.requires_grad_() for tensor in setup(600, 8, dtype=torch.bfloat16)]
    normed, _ = add_layer_norm(*arguments)
    normed.backward(torch.full_like(normed, 1.0078125))
    assert (arguments[3].grad.double() / (600 * 1.0078125) - 1).abs().max() < 2**-7


def test_large_means_do_not_cancel(backend):
    x, branch, weight, bias = setup(4, 96)
    out, _ = add_layer_norm(x + 3000, branch, weight, bias)
    exact, _ = exact_add_layer_norm((x + 3000).double() + branch.double(), 0 * x, weight, bias)
    native, _ = add_layer_norm_reference(x + 3000, branch, weight, bias)
    assert_error_budget(out, native, exact)


def test_a_constant_row_is_finite(backend):
    arguments = [tensor.requires_grad_() for tensor in setup(3, 96)]
    with torch.no_grad():
        arguments[0][1], arguments[1][1] = 2.0, -1.0
    out = add_layer_norm(*arguments)
    assert torch.equal(out[0][1], arguments[3])
    grads = torch.autograd.grad(out[0].sum(), arguments)
    assert all(grad.isfinite().all() for grad in grads)


def test_the_same_inputs_give_the_same_bits(backend):
    arguments = setup(131, 96)
    grads = [torch.randn(131, 96) for _ in range(2)]
    first, second = (gradients(add_layer_norm, arguments, grads, torch.float32) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


def test_reference_is_exact_and_differentiable():
    arguments = setup(2, 3, 5, dtype=torch.float64)
    truth = exact_add_layer_norm(*arguments)
    inputs = [tensor.requires_grad_() for tensor in arguments]
    for function in (add_layer_norm_reference, add_layer_norm):
        torch.testing.assert_close(function(*arguments), truth, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_opcheck(backend, shape):
    inputs = [tensor.requires_grad_() for tensor in setup(*shape)]
    torch.library.opcheck(torch.ops.fastmim.add_layer_norm.default, (*inputs, 1e-6))
    grad, total, weight = torch.randn(shape), torch.randn(shape).bfloat16(), torch.randn(8)
    for grad_total in (None, grad):
        torch.library.opcheck(
            torch.ops.fastmim.add_layer_norm_backward.default, (grad, grad_total, total, weight, 1e-6)
        )


def test_compiles_without_graph_breaks(backend, compiler):
    def step(*inputs):
        normed, total = add_layer_norm(*inputs)
        return (normed**2).sum() + (total**3).sum()

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
        ({"branch": torch.zeros(1, 8)}, ValueError, r"branch has shape \[1, 8\]; .* = \[4, 8\]"),
        ({"branch": torch.zeros(1, 4, 8)}, ValueError, r"branch has shape \[1, 4, 8\]; wanted \[R, D\]"),
        ({"branch": torch.zeros(4, 8, device="meta")}, ValueError, r"branch is on meta; wanted cpu"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight has shape \[4\]; wanted \[D\] = \[8\]"),
        ({"bias": None}, TypeError, r"bias is a NoneType; wanted a tensor \[D\]"),
        ({"weight": torch.zeros(8).int()}, TypeError, r"weight has dtype int32; wanted float32"),
        ({"bias": torch.zeros(8).half()}, TypeError, r"bias has dtype float16; wanted float32"),
        ({"x": torch.zeros(0, 8), "branch": torch.zeros(0, 8)}, ValueError, r"x .* wanted at least one row"),
        (
            {"x": torch.zeros(1, 4097), "branch": torch.zeros(1, 4097)},
            ValueError,
            r"x has shape \[1, 4097\]; wanted at most 4096 columns",
        ),
        ({"eps": 0.0}, ValueError, r"eps is 0\.0; wanted a positive number"),
    ],
)
def test_errors_name_argument_got_and_wanted(change, error, message):
    with pytest.raises(error, match=message):
        add_layer_norm(**(dict(zip(NAMES, setup(4, 8), strict=True)) | change))


def test_the_kernels_refuse_float64(monkeypatch):
    from fastmim.kernels import _dispatch

    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    with pytest.raises(TypeError, match=r"x has dtype torch.float64; the Triton kernels take float32"):
        add_layer_norm(*setup(4, 8, dtype=torch.float64))
