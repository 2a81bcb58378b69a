import pytest
import torch
from fastmim.kernels import embed_tokens, embed_tokens_reference

from tests.kernels.kernel_testing import (
    DTYPES,
    INDEX_DTYPES,
    LONG,
    assert_error_budget,
    rounding_factor,
    split_ids,
)

# batch, patches, kept, width; a tile holds 32 samples and 256 columns, a forward program 64 samples
SHAPES = [
    (1, 1, 1, 1),
    (2, 6, 5, 5),
    (3, 16, 4, 64),
    (2, 197, 49, 24),
    (1, 1023, 1, 7),
    (2, 5, 5, 300),
    (3, 7, 6, 96),
    (33, 13, 1, 7),
    (65, 7, 2, 48),
]


def setup(batch, patches, kept, width, dtype=torch.float32, ids_dtype=torch.int64):
    x = torch.randn(batch, kept, width).to(dtype)
    cls_token = torch.randn(1, 1, width).to(dtype)
    pos_embed = torch.randn(1, 1 + patches, width).to(dtype)
    _, _, ids_restore = split_ids(batch, patches, kept, ids_dtype)
    return x, cls_token, pos_embed, ids_restore


def exact_embed(x, cls_token, pos_embed, ids_restore):
    out = x.new_full((x.shape[0], 1 + x.shape[1], x.shape[2]), float("nan"))
    for sample in range(x.shape[0]):
        out[sample, 0] = cls_token[0, 0] + pos_embed[0, 0]
        for patch, row in enumerate(ids_restore[sample].tolist()):
            if row < x.shape[1]:
                out[sample, 1 + row] = x[sample, row] + pos_embed[0, 1 + patch]
    return out


def gradients(function, arguments, grad, dtype):
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in arguments[:3]]
    out = function(*inputs, arguments[3])
    return out.detach(), torch.autograd.grad(out, inputs, grad.to(dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES for dtype in DTYPES] + [(shape[:4], shape[4]) for shape in LONG],
)
def test_output_and_gradients(backend, unwritten_shows, shape, dtype):
    arguments = setup(*shape, dtype)
    grad = torch.randn(shape[0], 1 + shape[2], shape[3]).to(dtype)
    out, grads = gradients(embed_tokens, arguments, grad, dtype)
    native, native_grads = gradients(embed_tokens_reference, arguments, grad, dtype)
    exact, exact_grads = gradients(exact_embed, arguments, grad, torch.float64)
    factor = rounding_factor(backend, dtype)
    assert_error_budget(out, native, exact, factor)
    assert torch.equal(grads[0], grad[:, 1:])  # rows only move
    for actual, expected, truth in zip(grads[1:], native_grads[1:], exact_grads[1:], strict=True):
        # A sum that is rounded once may be up to one rounding off where PyTorch happens to be exact.
        assert_error_budget(actual, expected, truth, factor, floor=torch.finfo(dtype).eps)


@pytest.mark.parametrize("ids_dtype", INDEX_DTYPES)
def test_strided_inputs(backend, unwritten_shows, ids_dtype):
    x, cls_token, pos_embed, ids_restore = setup(3, 12, 5, 20, ids_dtype=ids_dtype)
    expected = exact_embed(x, cls_token, pos_embed, ids_restore)
    wide_ids = torch.cat([ids_restore, ids_restore], 1)
    for strided in (
        (x.mT.contiguous().mT, cls_token, pos_embed, ids_restore),
        (torch.cat([x, x], 1)[:, 5:], cls_token, pos_embed.mT.contiguous().mT, ids_restore.T.contiguous().T),
        (x, cls_token.repeat(1, 1, 2)[..., 20:], pos_embed, ids_restore.repeat_interleave(2, 1)[:, ::2]),
        (x.repeat_interleave(2, -1)[..., ::2], cls_token.repeat_interleave(2, -1)[..., ::2],
         pos_embed.repeat(2, 1, 1)[1:], wide_ids[:, 12:]),
    ):  # fmt: skip
        assert torch.equal(embed_tokens(*strided), expected)


def test_strided_gradient(backend, unwritten_shows):
    arguments = setup(2, 9, 3, 20)
    for grad in (
        torch.ones(()).expand(2, 4, 20),
        torch.randn(2, 20, 4).mT,
        torch.randn(4, 2, 20).transpose(0, 1),
    ):
        _, grads = gradients(embed_tokens, arguments, grad, torch.float32)
        _, exact = gradients(exact_embed, arguments, grad, torch.float64)
        for actual, expected in zip(grads, exact, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32", "float32"), ("float16", "float16", "bfloat16")])
def test_mixed_dtypes_promote_as_in_pytorch(backend, dtypes):
    *floats, ids_restore = setup(2, 9, 3, 20)
    inputs = [x.to(getattr(torch, dtype)).requires_grad_() for x, dtype in zip(floats, dtypes, strict=True)]
    out = embed_tokens(*inputs, ids_restore)
    native = embed_tokens_reference(*(x.float() for x in inputs), ids_restore)
    assert out.dtype == torch.float32
    assert torch.equal(out, native)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [str(grad.dtype) for grad in grads] == [f"torch.{dtype}" for dtype in dtypes]


def test_gradient_of_the_patches_is_a_view(backend):
    x, cls_token, pos_embed, ids_restore = setup(2, 9, 3, 20)
    x.requires_grad_()
    out = embed_tokens(x, cls_token, pos_embed, ids_restore)
    incoming = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, incoming)
    assert grad.data_ptr() == incoming[:, 1:].data_ptr()


def test_position_gradient_only_where_required(backend):
    x, cls_token, pos_embed, ids_restore = setup(2, 6, 2, 8)
    cls_token.requires_grad_()
    embed_tokens(x, cls_token, pos_embed, ids_restore).sum().backward()
    assert torch.equal(cls_token.grad, torch.full_like(cls_token, 2.0))
    assert x.grad is None
    assert pos_embed.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_the_batch_are_rounded_once(backend, dtype):
    # 600 gradients near 1: summed in bfloat16 they would stop growing near 256.
    x, cls_token, pos_embed, ids_restore = setup(600, 2, 1, 40, dtype)
    cls_token.requires_grad_(), pos_embed.requires_grad_()
    out = embed_tokens(x, cls_token, pos_embed, ids_restore)
    grad = (1 + torch.randn(out.shape)).to(dtype)
    out.backward(grad)
    exact = grad[:, :1].double().sum(0, keepdim=True)
    half_step = torch.finfo(dtype).eps / 2 + 2**-20
    torch.testing.assert_close(cls_token.grad.double(), exact, rtol=half_step, atol=0)
    # The interpreter cuts where hardware rounds.
    step = half_step * (2 if backend == "interpret" and dtype == torch.bfloat16 else 1)
    torch.testing.assert_close(pos_embed.grad[:, :1].double(), exact, rtol=step, atol=0)


def test_same_result_under_autocast(backend):
    arguments = setup(2, 9, 3, 16)
    expected = embed_tokens(*arguments)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(embed_tokens(*arguments), expected)


def test_reference_is_exact_and_differentiable():
    arguments = [x.double() if x.is_floating_point() else x for x in setup(2, 4, 2, 3)]
    assert torch.equal(embed_tokens_reference(*arguments), exact_embed(*arguments))
    floats = [x.requires_grad_() for x in arguments[:3]]
    for function in (embed_tokens_reference, embed_tokens):
        assert torch.autograd.gradcheck(lambda *x, f=function: f(*x, arguments[3]), floats)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
def test_opcheck(backend):
    *floats, ids_restore = setup(2, 6, 2, 8)
    inputs = [x.requires_grad_() for x in floats]
    torch.library.opcheck(torch.ops.fastmim.embed_tokens.default, (*inputs, ids_restore))
    arguments = torch.randn(2, 3, 8), ids_restore, torch.bfloat16
    torch.library.opcheck(torch.ops.fastmim.embed_tokens_position_gradient.default, arguments)


def test_compiles_without_graph_breaks(backend, compiler):
    *floats, ids_restore = setup(2, 6, 2, 8)
    inputs = [x.requires_grad_() for x in floats]

    def step(*inputs):
        return (embed_tokens(*inputs, ids_restore) ** 2).sum()

    expected = torch.autograd.grad(step(*inputs), inputs)
    actual = torch.autograd.grad(compiler(step)(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 2, 8).long()}, TypeError, r"x has dtype int64; wanted float32"),
        ({"x": torch.zeros(2, 7, 8)}, ValueError, r"x has 7 rows; wanted 1\.\.6: the kept ones"),
        ({"x": torch.zeros(2, 0, 8)}, ValueError, r"x has 0 rows; wanted 1\.\.6"),
        ({"x": torch.zeros(3, 2, 8)}, ValueError, r"ids_restore has batch 2; wanted 3, the batch of x"),
        ({"cls_token": torch.zeros(8)}, ValueError, r"cls_token has shape \[8\]; wanted \[1, 1, D\]"),
        ({"cls_token": torch.zeros(1, 1, 4)}, ValueError, r"cls_token .* wanted \[1, 1, D\] = \[1, 1, 8\]"),
        ({"pos_embed": torch.zeros(2, 7, 8)}, ValueError, r"pos_embed .* wanted \[1, 1\+N, D\] = \[1, 7, 8\]"),
        ({"pos_embed": torch.zeros(1, 6, 8)}, ValueError, r"pos_embed has shape \[1, 6, 8\]; .* = \[1, 7, 8\]"),
        ({"pos_embed": torch.zeros(1, 7, 8, device="meta")}, ValueError, r"pos_embed is on meta; wanted cpu"),
        ({"ids_restore": torch.zeros(2, 0).long()}, ValueError, r"ids_restore .* wanted at least one id"),
        ({"ids_restore": torch.zeros(2, 2)}, TypeError, r"ids_restore has dtype float32; wanted int64"),
        ({"ids_restore": torch.full((2, 6), 6)}, ValueError, r"ids_restore has values 6\.\.6; wanted 0\.\.5"),
    ],
)  # fmt: skip
def test_errors_name_argument_got_and_wanted(change, error, message):
    names = ("x", "cls_token", "pos_embed", "ids_restore")
    arguments = dict(zip(names, setup(2, 6, 2, 8), strict=True))
    with pytest.raises(error, match=message):
        embed_tokens(**(arguments | change))


def test_kernels_refuse_float64(backend):
    arguments = [x.double() if x.is_floating_point() else x for x in setup(2, 6, 2, 8)]
    if backend == "reference":
        assert embed_tokens(*arguments).dtype == torch.float64
    else:
        with pytest.raises(TypeError, match=r"x has dtype torch.float64; the Triton kernels take"):
            embed_tokens(*arguments)
