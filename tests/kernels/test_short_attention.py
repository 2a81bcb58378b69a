import pytest
import torch
from fastmim.kernels import short_attention, short_attention_reference

from tests.kernels.kernel_testing import DTYPES, assert_error_budget, rounding_factor

# samples, tokens, heads, head width: of MAE's encoder, of the quickstart's, of a whole tile, and what no tile's divides
SHAPES = [(1, 50, 2, 64), (2, 37, 1, 32), (1, 64, 1, 64), (2, 17, 2, 20), (2, 1, 1, 3), (1, 5, 3, 7)]


def setup(batch, tokens, heads, head, dtype=torch.float32):
    return (torch.randn(batch, tokens, 3, heads, head) * 2).to(dtype)


def exact_attention(qkv):
    """One head of one sample at a time."""
    samples = []
    for sample in qkv:
        heads = []
        for q, k, v in sample.permute(2, 1, 0, 3):
            scores = torch.exp(q @ k.T / q.shape[-1] ** 0.5)
            heads.append((scores / scores.sum(1, keepdim=True)) @ v)
        samples.append(torch.stack(heads, 1))
    return torch.stack(samples)


def gradients(function, qkv, grad, dtype):
    qkv = qkv.detach().to(dtype).requires_grad_()
    out = function(qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradient(backend, unwritten_shows, shape, dtype):
    qkv = setup(*shape, dtype=dtype)
    grad = torch.randn(shape).to(dtype)
    ours = gradients(short_attention, qkv, grad, dtype)
    native = gradients(short_attention_reference, qkv, grad, dtype)
    exact = gradients(exact_attention, qkv, grad, torch.float64)
    factor, floor = rounding_factor(backend, dtype), torch.finfo(dtype).eps
    for actual, expected, truth in zip(ours, native, exact, strict=True):
        assert_error_budget(actual, expected, truth, factor, floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_overflow_nothing(backend, dtype):
    qkv = setup(1, 19, 1, 16).mul_(100)
    qkv[:, :, 2] = torch.arange(19.0).view(1, 19, 1, 1)
    out = short_attention(qkv.to(dtype).requires_grad_())
    # The greatest score has all the weight.
    q, k, _ = qkv[0, :, :, 0].to(dtype).double().unbind(1)
    torch.testing.assert_close(out[0, :, 0, 0].double(), (q @ k.T).argmax(1).double(), rtol=1e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(out.sum(), out.grad_fn.next_functions[0][0].variable)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_and_gradients(backend, unwritten_shows, dtype):
    qkv, grad = setup(2, 5, 2, 8, dtype=dtype), torch.randn(2, 5, 2, 8).to(dtype)
    out, expected = gradients(short_attention, qkv, grad, dtype)
    for change in (
        lambda t: torch.cat([t[:, :2], t], 1)[:, 2:],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        strided = change(qkv).requires_grad_()
        actual = short_attention(strided)
        torch.testing.assert_close(actual, out)
        torch.testing.assert_close(torch.autograd.grad(actual, strided, change(grad))[0], expected)
    leaf = qkv.detach().requires_grad_()
    (actual,) = torch.autograd.grad(short_attention(leaf).sum(), leaf)  # an expanded gradient
    torch.testing.assert_close(actual, gradients(short_attention, qkv, torch.ones_like(grad), dtype)[1])


def test_the_same_inputs_give_the_same_bits(backend):
    qkv, grad = setup(3, 21, 2, 16, dtype=torch.bfloat16), torch.randn(3, 21, 2, 16)
    first, second = (gradients(short_attention, qkv, grad, torch.bfloat16) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_reference_is_exact_and_differentiable():
    qkv = setup(2, 5, 2, 3, dtype=torch.float64)
    truth = exact_attention(qkv)
    qkv.requires_grad_()
    for function in (short_attention_reference, short_attention):
        torch.testing.assert_close(function(qkv), truth, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(function, qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_input_is_kept(backend, dtype):
    qkv, kept = setup(2, 9, 2, 8, dtype=dtype).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        short_attention(qkv)
    assert [tensor.data_ptr() for tensor in kept] == [qkv.data_ptr()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    qkv = setup(2, 3, 2, 8, dtype=dtype)
    torch.library.opcheck(torch.ops.fastmim.short_attention.default, (qkv.requires_grad_(),))
    grad = torch.randn(3, 2, 2, 8).to(dtype).transpose(0, 1)
    torch.library.opcheck(torch.ops.fastmim.short_attention_backward.default, (grad, qkv.detach()))


def test_compiles_without_graph_breaks(backend, compiler):
    def step(qkv):
        return (short_attention(qkv * 2) ** 2).sum()

    compiled = compiler(step, dynamic=True)
    for tokens in (4, 5):
        qkv = setup(2, tokens, 2, 8).requires_grad_()
        expected = torch.autograd.grad(step(qkv), qkv)
        torch.testing.assert_close(torch.autograd.grad(compiled(qkv), qkv), expected)


@pytest.mark.parametrize(
    ("qkv", "error", "message"),
    [
        ([1.0], TypeError, r"qkv is a list; wanted a tensor \[B, N, 3, H, d\]"),
        (torch.zeros(1, 2, 3, 1, 8).int(), TypeError, r"qkv has dtype int32; wanted float32"),
        (torch.zeros(2, 3, 1, 8), ValueError, r"qkv has shape \[2, 3, 1, 8\]; wanted \[B, N, 3, H, d\]"),
        (torch.zeros(1, 2, 2, 1, 8), ValueError, r"wanted \[B, N, 3, H, d\] = \[any, any, 3, any, any\]"),
        (
            torch.zeros(0, 2, 3, 1, 8),
            ValueError,
            r"qkv has shape \[0, 2, 3, 1, 8\]; wanted at least one number",
        ),
        (torch.zeros(1, 65, 3, 1, 8), ValueError, r"wanted at most 64 tokens and heads of at most 64"),
        (torch.zeros(1, 2, 3, 1, 65), ValueError, r"wanted at most 64 tokens and heads of at most 64"),
    ],
)
def test_errors_name_argument_got_and_wanted(qkv, error, message):
    with pytest.raises(error, match=message):
        short_attention(qkv)
