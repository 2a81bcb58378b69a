import pytest
import torch
from fastmim.kernels import unshuffle, unshuffle_reference

from tests.kernels.kernel_testing import (
    DTYPES,
    INDEX_DTYPES,
    LONG,
    assert_error_budget,
    rounding_factor,
    split_ids,
)

# batch, patches, kept, width. A tile holds 32 samples, a forward program 64, a backward program 256 rows; a tile
# holds 256 columns.
SHAPES = [
    (1, 1, 1, 1),
    (2, 6, 5, 5),
    (3, 16, 4, 64),
    (2, 131, 33, 300),
    (2, 5, 5, 272),
    (33, 13, 1, 7),
    (65, 7, 2, 48),
    (257, 3, 2, 8),
]


def setup(batch, patches, kept, width, dtype=torch.float32, ids_dtype=torch.int64):
    latent = torch.randn(batch, 1 + kept, width).to(dtype)
    mask_token = torch.randn(1, 1, width).to(dtype)
    pos_embed = torch.randn(1, 1 + patches, width).to(dtype)
    _, _, ids_restore = split_ids(batch, patches, kept, ids_dtype)
    return latent, mask_token, pos_embed, ids_restore


def exact_unshuffle(latent, mask_token, pos_embed, ids_restore):
    batch, patches, kept = *ids_restore.shape, latent.shape[1] - 1
    rows = []
    for sample in range(batch):
        rows.append(latent[sample, 0] + pos_embed[0, 0])
        for place in range(patches):
            source = int(ids_restore[sample, place])
            token = latent[sample, 1 + source] if source < kept else mask_token[0, 0]
            rows.append(token + pos_embed[0, 1 + place])
    return torch.stack(rows).view(batch, 1 + patches, -1)


def gradients(function, arguments, grad, dtype):
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in arguments[:3]]
    out = function(*inputs, arguments[3])
    return out.detach(), torch.autograd.grad(out, inputs, grad.to(dtype), materialize_grads=True)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES for dtype in DTYPES] + [(shape[:4], shape[4]) for shape in LONG],
)
def test_output_and_gradients(backend, unwritten_shows, shape, dtype):
    arguments = setup(*shape, dtype)
    grad = torch.randn(shape[0], 1 + shape[1], shape[3]).to(dtype)
    out, grads = gradients(unshuffle, arguments, grad, dtype)
    native, native_grads = gradients(unshuffle_reference, arguments, grad, dtype)
    exact, exact_grads = gradients(exact_unshuffle, arguments, grad, torch.float64)
    factor = rounding_factor(backend, dtype)
    assert_error_budget(out, native, exact, factor)
    assert torch.equal(grads[0].double(), exact_grads[0])  # rows only move
    for actual, expected, truth in zip(grads[1:], native_grads[1:], exact_grads[1:], strict=True):
        # A sum that is rounded once may be up to one rounding off where PyTorch happens to be exact.
        assert_error_budget(actual, expected, truth, factor, floor=torch.finfo(dtype).eps)


@pytest.mark.parametrize("ids_dtype", INDEX_DTYPES)
def test_strided_inputs(backend, unwritten_shows, ids_dtype):
    latent, mask_token, pos_embed, ids_restore = setup(3, 12, 5, 20, ids_dtype=ids_dtype)
    expected = exact_unshuffle(latent, mask_token, pos_embed, ids_restore)
    wide_ids = torch.cat([ids_restore, ids_restore], 1)
    for strided in (
        (latent.mT.contiguous().mT, mask_token, pos_embed, ids_restore),
        (torch.cat([latent, latent], 1)[:, :6], mask_token, pos_embed, wide_ids[:, 12:]),
        (latent, mask_token.repeat(1, 1, 2)[..., 20:], pos_embed.mT.contiguous().mT, ids_restore.T.contiguous().T),
        (latent.repeat_interleave(2, -1)[..., ::2], mask_token.repeat_interleave(2, -1)[..., ::2],
         pos_embed.repeat(2, 1, 1)[1:], ids_restore),
    ):  # fmt: skip
        assert torch.equal(unshuffle(*strided), expected)


def test_strided_gradient(backend, unwritten_shows):
    arguments = setup(2, 9, 3, 20)
    for grad in (
        torch.ones(()).expand(2, 10, 20),
        torch.randn(2, 20, 10).mT,
        torch.randn(10, 2, 20).transpose(0, 1),
    ):
        _, grads = gradients(unshuffle, arguments, grad, torch.float32)
        _, exact = gradients(exact_unshuffle, arguments, grad, torch.float64)
        for actual, expected in zip(grads, exact, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32", "float32"), ("float16", "float16", "bfloat16")])
def test_mixed_dtypes_promote_as_in_pytorch(backend, dtypes):
    *floats, ids_restore = setup(2, 9, 3, 20)
    inputs = [x.to(getattr(torch, dtype)).requires_grad_() for x, dtype in zip(floats, dtypes, strict=True)]
    out = unshuffle(*inputs, ids_restore)
    native = unshuffle_reference(*inputs, ids_restore)
    assert out.dtype == native.dtype == torch.float32
    assert torch.equal(out, native)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [str(grad.dtype) for grad in grads] == [f"torch.{dtype}" for dtype in dtypes]


def test_position_gradient_only_where_required(backend):
    latent, mask_token, pos_embed, ids_restore = setup(2, 6, 2, 8)
    latent.requires_grad_()
    unshuffle(latent, mask_token, pos_embed, ids_restore).sum().backward()
    assert torch.equal(latent.grad, torch.ones_like(latent))
    assert mask_token.grad is None
    assert pos_embed.grad is None


def test_mask_token_gradient_keeps_float32_precision(backend):
    # 2 x 300 gradients of 1 + 2^-8: summed in bfloat16 they would stop growing near 512.
    latent, mask_token, pos_embed, ids_restore = setup(2, 301, 1, 8, torch.bfloat16)
    mask_token.requires_grad_()
    out = unshuffle(latent, mask_token, pos_embed, ids_restore)
    out.backward(torch.full_like(out, 1.0078125))
    assert (mask_token.grad.double() / (600 * 1.0078125) - 1).abs().max() < 2**-7


def test_same_result_under_autocast(backend):
    arguments = setup(2, 9, 3, 16)
    expected = unshuffle(*arguments)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(unshuffle(*arguments), expected)


def test_reference_is_exact_and_differentiable():
    arguments = [x.double() if x.is_floating_point() else x for x in setup(2, 4, 2, 3)]
    assert torch.equal(unshuffle_reference(*arguments), exact_unshuffle(*arguments))
    floats = [x.requires_grad_() for x in arguments[:3]]
    for function in (unshuffle_reference, unshuffle):
        assert torch.autograd.gradcheck(lambda *x, f=function: f(*x, arguments[3]), floats)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
def test_opcheck(backend):
    *floats, ids_restore = setup(2, 6, 2, 8)
    inputs = [x.requires_grad_() for x in floats]
    torch.library.opcheck(torch.ops.fastmim.unshuffle.default, (*inputs, ids_restore))
    grad = torch.randn(2, 7, 8)
    for pos_dtype in (None, torch.float16):
        arguments = grad, ids_restore, 2, torch.bfloat16, pos_dtype
        torch.library.opcheck(torch.ops.fastmim.unshuffle_backward.default, arguments)


def test_compiles_without_graph_breaks(backend, compiler):
    *floats, ids_restore = setup(2, 6, 2, 8)
    inputs = [x.requires_grad_() for x in floats]

    def step(*inputs):
        return (unshuffle(*inputs, ids_restore) ** 2).sum()

    expected = torch.autograd.grad(step(*inputs), inputs)
    actual = torch.autograd.grad(compiler(step)(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latent": torch.zeros(2, 3, 8).long()}, TypeError, r"latent has dtype int64; wanted float32"),
        ({"latent": torch.zeros(2, 8, 8)}, ValueError, r"latent has 8 rows; wanted 2\.\.7"),
        ({"latent": torch.zeros(2, 1, 8)}, ValueError, r"latent has 1 rows; wanted 2\.\.7"),
        (
            {"latent": torch.zeros(3, 3, 8)},
            ValueError,
            r"ids_restore has batch 2; wanted 3, the batch of latent",
        ),
        ({"mask_token": torch.zeros(8)}, ValueError, r"mask_token has shape \[8\]; wanted \[1, 1, D\]"),
        ({"mask_token": torch.zeros(1, 1, 4)}, ValueError, r"mask_token .* wanted \[1, 1, D\] = \[1, 1, 8\]"),
        (
            {"pos_embed": torch.zeros(1, 6, 8)},
            ValueError,
            r"pos_embed .* wanted \[1, 1\+N, D\] = \[1, 7, 8\]",
        ),
        ({"pos_embed": torch.zeros(1, 7, 8, device="meta")}, ValueError, r"pos_embed is on meta; wanted cpu"),
        ({"ids_restore": torch.zeros(2, 0).long()}, ValueError, r"ids_restore .* wanted at least one id"),
        ({"ids_restore": torch.zeros(2, 6)}, TypeError, r"ids_restore has dtype float32; wanted int64"),
        ({"ids_restore": torch.full((2, 6), 6)}, ValueError, r"ids_restore has values 6\.\.6; wanted 0\.\.5"),
    ],
)
def test_errors_name_argument_got_and_wanted(change, error, message):
    names = ("latent", "mask_token", "pos_embed", "ids_restore")
    arguments = dict(zip(names, setup(2, 6, 2, 8), strict=True))
    with pytest.raises(error, match=message):
        unshuffle(**(arguments | change))
