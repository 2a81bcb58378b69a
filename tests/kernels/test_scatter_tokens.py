import pytest
import torch
from fastmim.kernels import gather_tokens, scatter_tokens, scatter_tokens_reference

from tests.kernels.kernel_testing import DTYPES, INDEX_DTYPES, LONG, split_ids

# batch, tokens, kept, width
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (3, 17, 4, 64), (2, 10, 10, 300), (2, 70, 66, 16)]


def exact_scatter(x, ids, tokens, offset=0):
    out = torch.zeros(x.shape[0], tokens, x.shape[2], dtype=x.dtype)
    for sample in range(ids.shape[0]):
        for position in range(ids.shape[1]):
            out[sample, int(ids[sample, position]) + offset] = x[sample, position]
    return out


@pytest.mark.parametrize("ids_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "kept", "width"), SHAPES)
def test_rows_and_gradient_are_moved_unchanged(
    backend, unwritten_shows, batch, tokens, kept, width, dtype, ids_dtype
):
    x = torch.randn(batch, kept, width).to(dtype).requires_grad_()
    ids, _, _ = split_ids(batch, tokens, kept, ids_dtype)
    out = scatter_tokens(x, ids, tokens)
    assert out.dtype == dtype
    assert torch.equal(out, exact_scatter(x, ids, tokens))
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    assert torch.equal(x.grad, grad[torch.arange(batch)[:, None], ids.long()])


@pytest.mark.parametrize(("batch", "tokens", "kept", "width", "dtype"), LONG)
def test_long_sequences(backend, unwritten_shows, batch, tokens, kept, width, dtype):
    x = torch.randn(batch, kept, width).to(dtype)
    ids, _, _ = split_ids(batch, tokens, kept)
    assert torch.equal(scatter_tokens(x, ids, tokens), exact_scatter(x, ids, tokens))


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_offset_skips_rows(backend, unwritten_shows, offset):
    x = torch.randn(2, 4, 24)
    ids, _, _ = split_ids(2, 9, 4)
    out = scatter_tokens(x, ids, 9 + offset, offset=offset)
    assert torch.equal(out, exact_scatter(x, ids, 9 + offset, offset))
    assert torch.equal(gather_tokens(out, ids, offset), x)


def test_strided_tokens_and_ids(backend, unwritten_shows):
    ids, _, _ = split_ids(3, 10, 4)
    for x in (
        torch.randn(3, 5, 20)[:, 1:],
        torch.randn(3, 4, 50)[..., 5:45:2],
        torch.randn(1, 4, 20).expand(3, -1, -1),
        torch.randn(3, 20, 4).mT,
    ):
        for strided in (ids, ids.T.contiguous().T, ids.repeat_interleave(2, 1)[:, ::2]):
            assert torch.equal(scatter_tokens(x, strided, 10), exact_scatter(x, ids, 10))


def test_it_is_the_adjoint_of_gather(backend):
    x, y = torch.randn(2, 4, 16), torch.randn(2, 12, 16)
    ids, _, _ = split_ids(2, 11, 4)
    torch.testing.assert_close(
        (scatter_tokens(x, ids, 12, 1) * y).sum(), (x * gather_tokens(y, ids, 1)).sum()
    )


def test_reference_is_the_same_operation_and_differentiable():
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    ids, _, _ = split_ids(2, 4, 2)
    assert torch.equal(scatter_tokens_reference(x, ids, 5, 1), exact_scatter(x, ids, 5, 1))
    for function in (scatter_tokens_reference, scatter_tokens):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, ids, 5, 1), x)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, ids, 5, 1) ** 2, x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
def test_opcheck(backend):
    ids, _, _ = split_ids(2, 6, 3)
    x = torch.randn(2, 3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.fastmim.scatter_tokens.default, (x, ids, 7, 1))


def test_compiles_without_graph_breaks(backend, compiler):
    x = torch.randn(2, 3, 8, requires_grad=True)
    ids, _, _ = split_ids(2, 6, 3)

    def step(x):
        return (scatter_tokens(x * 2, ids, 7, 1) ** 2).sum()

    (expected,) = torch.autograd.grad(step(x), x)
    (actual,) = torch.autograd.grad(compiler(step)(x), x)
    torch.testing.assert_close(actual, expected)


X = torch.zeros(2, 3, 8)
IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "ids", "tokens", "offset", "error", "message"),
    [
        (X.int(), IDS, 5, 0, TypeError, r"x has dtype int32; wanted float32 or bfloat16 or float16"),
        (X[0], IDS, 5, 0, ValueError, r"x has shape \[3, 8\]; wanted \[B, K, D\]"),
        (X[:, :2], IDS, 5, 0, ValueError, r"x has shape \[2, 2, 8\]; wanted \[B, K, D\] = \[any, 3, any\]"),
        (X, IDS.float(), 5, 0, TypeError, r"ids has dtype float32; wanted int64 or int32"),
        (X, IDS[:1], 5, 0, ValueError, r"ids has batch 1; wanted 2, the batch of x"),
        (X, IDS[:, :0], 5, 0, ValueError, r"ids has shape \[2, 0\]; wanted at least one id"),
        (X, IDS.to("meta"), 5, 0, ValueError, r"ids is on meta; wanted cpu"),
        (X, IDS, 2, 0, ValueError, r"tokens is 2; wanted at least 3, one row per id"),
        (X, IDS, 5, 5, ValueError, r"offset is 5; wanted 0\.\.4"),
        (X, IDS + 5, 5, 0, ValueError, r"ids has values 5\.\.5; wanted 0\.\.4"),
        (X, IDS + 4, 5, 1, ValueError, r"ids has values 4\.\.4; wanted -1\.\.3"),
    ],
)
def test_errors_name_argument_got_and_wanted(x, ids, tokens, offset, error, message):
    with pytest.raises(error, match=message):
        scatter_tokens(x, ids, tokens, offset)


def test_kernels_refuse_float64(backend):
    x, ids = torch.zeros(2, 3, 8, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)
    if backend == "reference":
        assert scatter_tokens(x, ids, 4).dtype == torch.float64
    else:
        with pytest.raises(TypeError, match=r"x has dtype torch.float64; the Triton kernels take"):
            scatter_tokens(x, ids, 4)
