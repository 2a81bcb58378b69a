"""A softmax and its gradient in one visit of each row: against float64, in C and by PyTorch."""

import pytest
import torch
from fastmim.kernels import _dispatch
from fastmim.kernels.softmax_gradient import softmax_gradient
from torch import Tensor

HALF_STEP = 2**-8
"""Of bfloat16, relative: what rounding to the nearest changes at most."""


@pytest.fixture(params=["auto", "reference"])
def mode(request, monkeypatch):
    monkeypatch.setattr(_dispatch, "MODE", request.param)
    return request.param


def exact(scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and the gradient of scores, in float64, from their definitions."""
    powers = (scores.double() - scores.double().amax(-1, keepdim=True)).exp()
    probabilities = powers / powers.sum(-1, keepdim=True)
    dot = (probabilities * grad.double()).sum(-1, keepdim=True)
    return probabilities, probabilities * (grad.double() - dot)


def problem(*shape: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return spread * torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 50, 197, 5000])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_it_is_the_gradient_of_a_softmax(mode, size, spread):
    scores, grad = problem(3, 7, size, spread=spread)
    wanted, grad_before = exact(scores, grad), grad.clone()
    room = scores.data_ptr(), grad.data_ptr()
    found = softmax_gradient(scores, grad)
    assert (tuple(x.data_ptr() for x in found) == room) == (mode == "auto")
    largest = grad_before.double().abs().max()
    # The reference's gradient is made of rounded probabilities, C's is rounded once.
    slack = 1e-6 + (0 if mode == "auto" else 3 * HALF_STEP * wanted[0])
    for got, want, scale in zip(found, wanted, (1, largest), strict=True):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - want).abs() <= 1.001 * HALF_STEP * want.abs() + slack * scale).all()
    if mode == "auto" and spread == 1:
        assert (found[0] != wanted[0].bfloat16()).double().mean() < 1e-3  # what float32 leaves undecided


def test_threads_do_not_change_it(monkeypatch):
    monkeypatch.setattr(_dispatch, "MODE", "auto")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(softmax_gradient(*problem(2, 11, 37)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_what_is_no_number_stays_none(mode):
    scores, grad = problem(4, 50)
    scores[1, 3] = torch.nan
    scores[2, 49] = torch.inf
    grad[3, 7] = torch.nan
    probabilities, found = softmax_gradient(scores, grad)
    assert probabilities.isnan().any(-1).tolist() == [False, True, True, False]
    assert found.isnan().any(-1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("size", [1, 17, 197])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_in_float32(mode, size, spread):
    scores, grad = (x.float() for x in problem(3, 7, size, spread=spread))
    wanted, scale = exact(scores, grad), grad.abs().max()
    for got, want in zip(softmax_gradient(scores, grad), wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("case", ["float64", "strided", "empty"])
def test_what_c_does_not_take_is_computed_too(monkeypatch, case):
    monkeypatch.setattr(_dispatch, "MODE", "auto")
    scores, grad = problem(3, 6, 8)
    if case == "float64":
        scores, grad = scores.double(), grad.double()
    if case == "strided":
        scores = scores.transpose(0, 1).contiguous().transpose(0, 1)
    if case == "empty":
        scores, grad = scores[:0], grad[:0]
    wanted = exact(scores, grad)
    for got, want in zip(softmax_gradient(scores, grad), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0.02)
