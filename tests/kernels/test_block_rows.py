"""GELU and LayerNorm on rows, with their gradients: against float64, in C and by PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from fastmim.kernels import _dispatch
from fastmim.kernels._native import is_plain
from fastmim.kernels.block_rows import gelu_rows, gelu_rows_gradient, norm_rows, norm_rows_gradient

HALF_STEP = 2**-8
"""Of bfloat16, relative: what rounding to the nearest changes at most."""
EPS = 1e-6
SHAPES = [(1, 1), (7, 16), (5, 37), (97, 130)]


@pytest.fixture(params=["auto", "reference"])
def mode(request, monkeypatch):
    monkeypatch.setattr(_dispatch, "MODE", request.param)
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def close(got, exact, dtype, mode, scale=None):
    """Rounded once by C; PyTorch rounds what it passes on, relative to the largest."""
    scale = exact.abs().max() if scale is None else scale
    step = HALF_STEP if dtype == torch.bfloat16 else 2**-24
    slack = 1e-6 if dtype == torch.float32 or mode == "auto" else 4 * HALF_STEP
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= 1.001 * step * exact.abs() + slack * scale).all()


def random(*shape, dtype):
    return torch.randn(shape).to(dtype)


def gelu_problem(shape, dtype):
    torch.manual_seed(0)
    return 3 * random(*shape, dtype=dtype), random(shape[1], dtype=dtype), random(*shape, dtype=dtype)


def exact_gelu(x):
    return x * (1 + (x / 2**0.5).erf()) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_of_rows_and_a_bias(mode, dtype, shape):
    hidden, bias, _ = gelu_problem(shape, dtype)
    out = torch.full_like(hidden, torch.nan)
    assert gelu_rows(hidden, bias, out) is out
    close(out, exact_gelu(hidden.double() + bias.double()), dtype, mode)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_gelu(mode, dtype, shape):
    hidden, bias, grad = gelu_problem(shape, dtype)
    x = (hidden.double() + bias.double()).requires_grad_()
    exact = exact_gelu(x)
    exact.backward(grad.double())
    of_bias = torch.randn(shape[1])
    wanted = of_bias.double() + x.grad.sum(0)
    gelu_rows_gradient(hidden, bias, grad, of_bias)
    close(hidden, exact.detach(), dtype, mode)
    close(grad, x.grad, dtype, mode)
    slack = 1e-5 if dtype == torch.float32 or mode == "auto" else 0.1
    torch.testing.assert_close(of_bias.double(), wanted, rtol=slack, atol=slack)


def test_gelu_has_tails(monkeypatch):
    monkeypatch.setattr(_dispatch, "MODE", "auto")
    x = torch.tensor([[-torch.inf, -3e38, -100, -20, -14.5, -13, -6, 0, 1e-30, 6, 13, 100, 3e38, torch.inf]])
    grad, active = torch.ones_like(x), x.clone()
    gelu_rows_gradient(active, torch.zeros(x.shape[1]), grad, torch.zeros(x.shape[1]))
    finite = slice(1, -1)
    exact = (x[0, finite].double() * torch.special.ndtr(x[0, finite].double())).float()
    torch.testing.assert_close(active[0, finite], exact, rtol=1e-6, atol=1e-6)
    slope = torch.special.ndtr(x[0].double())
    slope[finite] += (x[0, finite].double() * (-(x[0, finite].double() ** 2) / 2).exp()) / (
        2 * torch.pi
    ) ** 0.5
    torch.testing.assert_close(grad[0, finite], slope[finite].float(), rtol=1e-6, atol=1e-6)
    assert active[0, -1] == torch.inf


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_a_norm_and_its_gradient(mode, dtype, shape, adds):
    torch.manual_seed(0)
    x, grad, added = (
        2 * random(*shape, dtype=dtype) + 1,
        random(*shape, dtype=dtype),
        random(*shape, dtype=dtype),
    )
    gain, shift = random(shape[1], dtype=dtype), random(shape[1], dtype=dtype)
    leaves = [t.double().requires_grad_() for t in (x, gain, shift)]
    normed = F.layer_norm(leaves[0], (shape[1],), *leaves[1:], EPS)
    normed.backward(grad.double())
    out = torch.full_like(x, torch.nan)
    assert norm_rows(x, gain, shift, EPS, out) is out
    close(out, normed.detach(), dtype, mode)
    of_x, sums = torch.full_like(x, torch.nan), torch.randn(3, shape[1])
    wanted = sums.double() + torch.stack(
        [leaves[1].grad, leaves[2].grad, added.double().sum(0) if adds else torch.zeros(shape[1]).double()]
    )
    norm_rows_gradient(x, gain, shift, EPS, grad, added if adds else None, of_x, sums)
    close(grad, normed.detach(), dtype, mode)
    exact = leaves[0].grad + (added.double() if adds else 0)
    close(of_x, exact, dtype, mode, scale=max(1, exact.abs().max()))
    slack = 2e-5 if dtype == torch.float32 or mode == "auto" else 0.1
    torch.testing.assert_close(sums.double(), wanted, rtol=slack, atol=slack)


def test_threads_do_not_change_it(monkeypatch):
    monkeypatch.setattr(_dispatch, "MODE", "auto")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 50):
            torch.set_num_threads(count)
            hidden, bias, grad = gelu_problem((100, 130), torch.float32)
            of_bias, sums, of_x = torch.zeros(130), torch.zeros(3, 130), torch.empty_like(hidden)
            normed = norm_rows(hidden, bias, bias, EPS, torch.empty_like(hidden))
            gelu_rows_gradient(hidden, bias, grad, of_bias)
            norm_rows_gradient(hidden, bias, bias, EPS, grad, hidden, of_x, sums)
            found.append((normed, hidden, grad, of_bias, sums, of_x))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_what_is_no_number_stays_none(mode, dtype):
    hidden, bias, grad = gelu_problem((4, 37), dtype)
    hidden[1, 3] = torch.nan
    grad[2, 5] = torch.nan
    of_bias = torch.zeros(37)
    x, of_norm, of_x = hidden.clone(), grad.clone(), torch.empty_like(hidden)
    assert norm_rows(x, bias, bias, EPS, of_x).isnan().all(-1).tolist() == [False, True, False, False]
    gelu_rows_gradient(hidden, bias, grad, of_bias)
    assert hidden.isnan().nonzero().tolist() == [[1, 3]]
    assert grad.isnan().nonzero().tolist() == [[1, 3], [2, 5]]
    assert of_bias.isnan().nonzero().flatten().tolist() == [3, 5]
    norm_rows_gradient(x, bias, bias, EPS, of_norm, None, of_x, torch.zeros(3, 37))
    assert of_norm.isnan().all(-1).tolist() == [False, True, False, False]
    assert of_x.isnan().any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("case", [torch.float64, torch.float16, "strided", "empty"], ids=str)
def test_what_c_does_not_take_is_computed_too(monkeypatch, case):
    monkeypatch.setattr(_dispatch, "MODE", "auto")
    dtype = torch.float32 if isinstance(case, str) else case
    hidden, bias, grad = gelu_problem((6, 8), dtype)
    if case == "strided":
        hidden = hidden.T.contiguous().T
    if case == "empty":
        hidden, grad = hidden[:0], grad[:0]
    sums = torch.promote_types(dtype, torch.float32)
    leaves = [t.double().clone().requires_grad_() for t in (hidden, bias, bias)]
    normed = F.layer_norm(leaves[0], (8,), *leaves[1:], EPS)
    normed.backward(grad.double())
    of_norm, of_x = grad.clone(), torch.empty_like(grad)
    found = norm_rows(hidden, bias, bias, EPS, of_x)
    torch.testing.assert_close(found.double(), normed.detach(), rtol=0, atol=0.02)
    norm_rows_gradient(hidden, bias, bias, EPS, of_norm, grad, of_x, torch.zeros(3, 8, dtype=sums))
    torch.testing.assert_close(of_norm.double(), normed.detach(), rtol=0, atol=0.02)
    torch.testing.assert_close(of_x.double(), leaves[0].grad + grad.double(), rtol=0, atol=0.02)
    exact = exact_gelu(hidden.double() + bias.double())
    torch.testing.assert_close(gelu_rows(hidden, bias, of_x).double(), exact, rtol=0, atol=0.02)
    gelu_rows_gradient(hidden, bias, grad, torch.zeros(8, dtype=sums))
    torch.testing.assert_close(hidden.double(), exact, rtol=0, atol=0.02)


def test_c_is_given_what_it_takes(monkeypatch):
    monkeypatch.setattr(_dispatch, "MODE", "auto")
    hidden, bias, grad = gelu_problem((6, 8), torch.float32)
    wrong = [
        (hidden, bias, grad[:5]),
        (hidden, bias[:4], grad),
        (hidden, grad, grad),
        (hidden, bias.bfloat16(), grad),
    ]
    for arguments in wrong:
        with pytest.raises(AssertionError):
            gelu_rows_gradient(*arguments, torch.zeros(8))
    with pytest.raises(AssertionError):
        gelu_rows_gradient(hidden, bias, grad, torch.zeros(4))
    with pytest.raises(AssertionError):
        norm_rows_gradient(hidden, bias, bias, EPS, grad, None, torch.empty_like(grad), torch.zeros(3, 4))
    with pytest.raises(AssertionError):
        norm_rows(hidden, bias, bias, EPS, grad[:5])


class Elsewhere(torch.Tensor):
    """A subclass, which may keep its numbers where its address does not tell."""


def test_subclasses_are_left_to_pytorch():
    assert is_plain(torch.zeros(2)) and is_plain(torch.nn.Parameter(torch.zeros(2)))
    assert not is_plain(torch.zeros(2).as_subclass(Elsewhere)) and not is_plain(torch.zeros(2, 3).T)
