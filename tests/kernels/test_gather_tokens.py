import pytest
import torch
from fastmim.kernels import gather_tokens, gather_tokens_reference

from tests.kernels.kernel_testing import DTYPES, INDEX_DTYPES, LONG, split_ids

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (3, 17, 4, 64), (2, 10, 10, 300), (2, 70, 66, 16)]


def exact_gather(x, ids, offset=0):
    out = torch.zeros(*ids.shape, x.shape[2], dtype=x.dtype)
    for sample in range(ids.shape[0]):
        for position in range(ids.shape[1]):
            out[sample, position] = x[sample, int(ids[sample, position]) + offset]
    return out


def exact_scatter(grad, ids, tokens, offset=0):
    out = torch.zeros(grad.shape[0], tokens, grad.shape[2], dtype=grad.dtype)
    for sample in range(ids.shape[0]):
        for position in range(ids.shape[1]):
            out[sample, int(ids[sample, position]) + offset] = grad[sample, position]
    return out


@pytest.mark.parametrize("ids_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "kept", "width"), SHAPES)
def test_rows_and_gradient_are_moved_unchanged(
    backend, unwritten_shows, batch, tokens, kept, width, dtype, ids_dtype
):
    x = torch.randn(batch, tokens, width).to(dtype).requires_grad_()
    ids, _, _ = split_ids(batch, tokens, kept, ids_dtype)
    out = gather_tokens(x, ids)
    assert out.dtype == dtype
    assert torch.equal(out, exact_gather(x, ids))
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    assert torch.equal(x.grad, exact_scatter(grad, ids, tokens))


@pytest.mark.parametrize(("batch", "tokens", "kept", "width", "dtype"), LONG)
def test_long_sequences(backend, unwritten_shows, batch, tokens, kept, width, dtype):
    x = torch.randn(batch, tokens, width).to(dtype).requires_grad_()
    ids, _, _ = split_ids(batch, tokens, kept)
    out = gather_tokens(x, ids)
    assert torch.equal(out, exact_gather(x, ids))
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    assert torch.equal(x.grad, exact_scatter(grad, ids, tokens))


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_offset_skips_rows(backend, unwritten_shows, offset):
    x = torch.randn(2, 9 + offset, 24, requires_grad=True)
    ids, _, _ = split_ids(2, 9, 4)
    out = gather_tokens(x, ids, offset=offset)
    assert torch.equal(out, x[:, offset:][torch.arange(2)[:, None], ids])
    grad = torch.randn(out.shape)
    out.backward(grad)
    assert torch.equal(x.grad, exact_scatter(grad, ids, 9 + offset, offset))


LAYOUTS = {
    "slice of rows": lambda: torch.randn(3, 11, 20)[:, 1:],
    "slice of columns": lambda: torch.randn(3, 10, 50)[..., 5:45:2],
    "expanded batch": lambda: torch.randn(1, 10, 20).expand(3, -1, -1),
    "expanded rows": lambda: torch.randn(3, 1, 20).expand(-1, 10, -1),
    "batch second": lambda: torch.randn(10, 3, 20).transpose(0, 1),
    "columns first": lambda: torch.randn(3, 20, 10).transpose(1, 2),
    "row step not a divisor": lambda: torch.randn(3 * 211).as_strided((3, 10, 20), (211, 20, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_sources(backend, unwritten_shows, layout):
    x = LAYOUTS[layout]()
    ids, _, _ = split_ids(3, 10, 4)
    assert torch.equal(gather_tokens(x, ids), exact_gather(x, ids))


@pytest.mark.parametrize(
    "make_grad",
    [
        lambda: torch.ones(()).expand(2, 4, 20),
        lambda: torch.randn(2, 20, 4).transpose(1, 2),
        lambda: torch.randn(4, 2, 20).transpose(0, 1),
    ],
    ids=["expanded", "columns first", "batch second"],
)
def test_strided_gradients(backend, unwritten_shows, make_grad):
    grad = make_grad()
    x = torch.randn(2, 9, 20, requires_grad=True)
    ids, _, _ = split_ids(2, 9, 4)
    gather_tokens(x, ids).backward(grad)
    assert torch.equal(x.grad, exact_scatter(grad, ids, 9))


def test_ids_of_any_strides(backend, unwritten_shows):
    x = torch.randn(2, 9, 20, requires_grad=True)
    ids, _, _ = split_ids(2, 9, 4)
    grad = torch.randn(2, 4, 20)
    for strided in (ids.T.contiguous().T, ids.repeat_interleave(2, 1)[:, ::2]):
        out = gather_tokens(x, strided)
        assert torch.equal(out, exact_gather(x, ids))
        assert torch.equal(torch.autograd.grad(out, x, grad)[0], exact_scatter(grad, ids, 9))


def test_gradient_of_a_shared_table_sums_over_the_batch(backend):
    table = torch.randn(1, 6, 8, requires_grad=True)
    ids, _, _ = split_ids(3, 6, 2)
    gather_tokens(table.expand(3, -1, -1), ids).sum().backward()
    counts = torch.bincount(ids.flatten(), minlength=6).float()
    assert torch.equal(table.grad, counts[None, :, None].expand(1, 6, 8))


def test_reference_is_the_same_operation_and_differentiable():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    ids, _, _ = split_ids(2, 4, 2)
    assert torch.equal(gather_tokens_reference(x, ids, 1), exact_gather(x, ids, 1))
    assert torch.autograd.gradcheck(lambda x: gather_tokens_reference(x, ids, 1), x)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, ids, 1), x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
def test_opcheck(backend):
    ids, _, _ = split_ids(2, 6, 3)
    x = torch.randn(2, 7, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.fastmim.gather_tokens.default, (x, ids, 1))
    grad = torch.randn(2, 3, 8)
    torch.library.opcheck(torch.ops.fastmim.scatter_tokens.default, (grad, ids, 7, 1))


def test_compiles_without_graph_breaks(backend, compiler):
    x = torch.randn(2, 7, 8, requires_grad=True)
    ids, _, _ = split_ids(2, 6, 3)

    def step(x):
        return (gather_tokens(x * 2, ids, 1) ** 2).sum()

    (expected,) = torch.autograd.grad(step(x), x)
    (actual,) = torch.autograd.grad(compiler(step)(x), x)
    torch.testing.assert_close(actual, expected)


X = torch.zeros(2, 4, 8)
IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "ids", "offset", "error", "message"),
    [
        (X.int(), IDS, 0, TypeError, r"x has dtype int32; wanted float32 or bfloat16 or float16"),
        ("x", IDS, 0, TypeError, r"x is a str; wanted a tensor \[B, N, D\]"),
        (X[0], IDS, 0, ValueError, r"x has shape \[4, 8\]; wanted \[B, N, D\]"),
        (X, IDS.float(), 0, TypeError, r"ids has dtype float32; wanted int64 or int32"),
        (X, IDS[0], 0, ValueError, r"ids has shape \[3\]; wanted \[B, K\]"),
        (X, IDS[:1], 0, ValueError, r"ids has batch 1; wanted 2, the batch of x"),
        (X, IDS[:, :0], 0, ValueError, r"ids has shape \[2, 0\]; wanted at least one id"),
        (X, IDS.to("meta"), 0, ValueError, r"ids is on meta; wanted cpu"),
        (X, IDS, 4, ValueError, r"offset is 4; wanted 0\.\.3"),
        (X, IDS + 4, 0, ValueError, r"ids has values 4\.\.4; wanted 0\.\.3"),
        (X, IDS + 3, 1, ValueError, r"ids has values 3\.\.3; wanted -1\.\.2"),
    ],
)
def test_errors_name_argument_got_and_wanted(x, ids, offset, error, message):
    with pytest.raises(error, match=message):
        gather_tokens(x, ids, offset)


def test_kernels_refuse_float64(backend):
    x, ids = torch.zeros(2, 4, 8, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)
    if backend == "reference":
        assert gather_tokens(x, ids).dtype == torch.float64
    else:
        with pytest.raises(TypeError, match=r"x has dtype torch.float64; the Triton kernels take"):
            gather_tokens(x, ids)
