"""Blocks a few rows at a time: gradients against float64, what is kept, and where modules run instead."""

import pytest
import torch
import torch.nn.functional as F
from fastmim.kernels import _dispatch
from torch import nn

from benchmarks.memory import kept_by
from fastmim.models import by_rows
from fastmim.models.by_rows import add_linear, norm_linear, norm_mlp

WIDTH, HIDDEN = 16, 48


def parts():
    """norm, fc1, fc2 with parameters that show in every gradient, and x [3, 7, WIDTH], no multiple of any part."""
    torch.manual_seed(0)
    modules = nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return *modules, torch.randn(3, 7, WIDTH)


def naive_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


CASES = {
    "norm_linear": (
        lambda x, y, norm, fc1, fc2: norm_linear(x, norm, fc1),
        lambda x, y, g, s, w1, b1, w2, b2: naive_norm(x, g, s) @ w1.T + b1,
    ),
    "add_linear": (
        lambda x, y, norm, fc1, fc2: add_linear(x, y, fc2),
        lambda x, y, g, s, w1, b1, w2, b2: x + y @ w2.T + b2,
    ),
    "norm_mlp": (
        lambda x, y, norm, fc1, fc2: norm_mlp(x, norm, fc1, fc2, add=False),
        lambda x, y, g, s, w1, b1, w2, b2: F.gelu(naive_norm(x, g, s) @ w1.T + b1) @ w2.T + b2,
    ),
    "norm_mlp, added": (
        lambda x, y, norm, fc1, fc2: norm_mlp(x, norm, fc1, fc2, add=True),
        lambda x, y, g, s, w1, b1, w2, b2: x + F.gelu(naive_norm(x, g, s) @ w1.T + b1) @ w2.T + b2,
    ),
}


def results(function, inputs, modules, cotangent):
    """The output and the gradients of inputs and parameters; None where there is none."""
    out = function(*inputs, *modules)
    leaves = [
        *inputs,
        *(p for module in modules for p in getattr(module, "parameters", lambda m=module: [m])()),
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(
        torch.autograd.grad(out, wanted, cotangent.to(out.dtype)[..., : out.shape[-1]], allow_unused=True)
    )
    return [out.detach(), *(next(found) if leaf.requires_grad else None for leaf in leaves)]


def compare(case, dtype, tolerance, frozen=(), strided=False):
    function, naive = CASES[case]
    *modules, x = parts()
    y, cotangent = torch.randn(3, 7, HIDDEN), torch.randn(3, 7, HIDDEN)
    x, y, cotangent = x.to(dtype), y.to(dtype), cotangent.to(dtype)
    modules = [module.to(dtype) for module in modules]
    names = [f"{i}.{name}" for i, module in enumerate(modules) for name, _ in module.named_parameters()]
    parameters = [p for module in modules for p in module.parameters()]
    for name, parameter in zip(names, parameters, strict=True):
        parameter.requires_grad_(name not in frozen)
    exact = [p.detach().double().requires_grad_(p.requires_grad) for p in parameters]
    given = [
        (t.mT.contiguous().mT if strided else t).detach().requires_grad_(name not in frozen)
        for t, name in ((x, "x"), (y, "y"))
    ]
    truth = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    actual = results(function, given, modules, cotangent)
    expected = results(naive, truth, exact, cotangent)
    for got, wanted in zip(actual, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert got.dtype == dtype
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance


@pytest.fixture(params=[1, 5, 1000], ids=["21 parts", "5 parts", "1 part"])
def several_parts(request, monkeypatch):
    monkeypatch.setattr(by_rows, "PART_BYTES", request.param * HIDDEN * 4)


@pytest.mark.usefixtures("several_parts")
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_float64(case):
    compare(case, torch.float32, 3e-6)


@pytest.mark.parametrize("case", CASES)
def test_in_bf16_a_sum_over_few_parts_is_rounded_once_a_part(case, monkeypatch):
    monkeypatch.setattr(by_rows, "PART_BYTES", 11 * HIDDEN * 2)  # two parts, as of a step in practice
    compare(case, torch.bfloat16, 0.03)


def test_in_bf16_a_sum_over_many_parts_is_as_exact_as_that_of_one(monkeypatch):
    norm, fc1, fc2, _ = parts()
    tokens = torch.randn(4096, WIDTH)
    modules = [module.bfloat16() for module in (norm, fc1, fc2)]
    cotangent = torch.randn(4096, WIDTH).bfloat16()

    def weights_gradients(function, x, dtype):
        leaves = [m.weight.detach().to(dtype).requires_grad_() for m in modules[1:]]
        out = function(x.to(dtype), *leaves)
        return [g.double() for g in torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    def naive(x, w1, w2):
        g, s, b1, b2 = (p.to(x.dtype) for p in (norm.weight, norm.bias, fc1.bias, fc2.bias))
        return F.gelu(F.layer_norm(x, (WIDTH,), g, s, 1e-6) @ w1.T + b1) @ w2.T + b2

    def fused(x, w1, w2):
        return by_rows._NormMLP.apply(
            x, norm.weight, norm.bias, w1, fc1.bias, w2, fc2.bias, 1e-6, False, True
        )

    x = tokens.bfloat16()
    exact = weights_gradients(naive, x, torch.float64)
    one = weights_gradients(naive, x, torch.bfloat16)
    monkeypatch.setattr(by_rows, "PART_BYTES", 64 * HIDDEN * 2)
    many = weights_gradients(fused, x, torch.bfloat16)
    for truth, native, ours in zip(exact, one, many, strict=True):
        assert (ours - truth).abs().max() < 2 * (native - truth).abs().max()


@pytest.mark.parametrize("case", CASES)
def test_inputs_may_have_any_strides(case):
    compare(case, torch.float32, 3e-6, strided=True)


@pytest.mark.usefixtures("several_parts")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "frozen", [("1.weight", "2.weight"), ("x", "y"), ("0.weight", "0.bias", "1.bias", "2.bias")]
)
def test_what_is_frozen_has_no_gradient(case, frozen):
    compare(case, torch.float32, 3e-6, frozen)


def test_the_mlp_leaves_what_gelu_is_given_and_its_result():
    norm, fc1, fc2, x = parts()
    x.requires_grad_()
    norm_mlp(x, norm, fc1, fc2, add=True)  # takes the memory that calls share
    kept, _ = kept_by(lambda: norm_mlp(x, norm, fc1, fc2, add=True), torch.device("cpu"))
    assert kept == x.nbytes + x.nbytes * HIDDEN // WIDTH
    kept, _ = kept_by(lambda: norm_linear(x, norm, fc1), torch.device("cpu"))
    assert kept == x.nbytes * HIDDEN // WIDTH
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
        for _ in range(2):
            norm_mlp(x, norm, fc1, fc2, add=True)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert largest <= x.nbytes * HIDDEN // WIDTH  # the first takes memory that calls share


@pytest.mark.parametrize("case", CASES)
def test_gradients_keep_no_memory_but_their_own(case):
    *modules, x = parts()
    y = torch.randn(3, 7, HIDDEN)
    CASES[case][0](x.requires_grad_(), y, *modules).sum().backward()
    for parameter in (p for module in modules for p in module.parameters() if p.grad is not None):
        assert parameter.grad.untyped_storage().nbytes() == parameter.nbytes


def test_a_default_device_changes_nothing(monkeypatch):
    monkeypatch.setattr(by_rows, "_room", by_rows.Room())
    norm, fc1, fc2, x = parts()
    with torch.device("meta"):
        found = norm_mlp(x, norm, fc1, fc2, add=True)
        found.sum().backward()
    assert torch.equal(found, norm_mlp(x, norm, fc1, fc2, add=True)) and fc1.weight.grad.device.type == "cpu"


def test_of_no_rows_come_none():
    norm, fc1, fc2, x = parts()
    out = norm_mlp(x[:0], norm, fc1, fc2, add=True)
    out.sum().backward()
    assert out.shape == (0, 7, WIDTH) and not fc1.weight.grad.any() and not fc2.weight.grad.any()


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_what_is_not_kept_lies_in_shared_memory(monkeypatch, mode):
    monkeypatch.setattr(_dispatch, "MODE", mode)
    room = by_rows.Room()
    monkeypatch.setattr(by_rows, "_room", room)
    norm, fc1, fc2, x = parts()
    norm_linear(x, norm, fc1)
    assert {name for name, _ in room._flat} == {"normed"}
    norm_mlp(x, norm, fc1, fc2, add=True)
    assert {name for name, _ in room._flat} == {"normed", "active"}


def test_training_goes_on_after_inference(monkeypatch):
    monkeypatch.setattr(by_rows, "_room", by_rows.Room())
    norm, fc1, fc2, x = parts()
    with torch.inference_mode():
        seen = norm_mlp(x, norm, fc1, fc2, add=True)
    learned = norm_mlp(x, norm, fc1, fc2, add=True)
    learned.sum().backward()
    assert torch.equal(seen, learned) and fc1.weight.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_a_second_backward_pass_finds_the_same(monkeypatch, mode):
    """The first writes over what was kept for it."""
    monkeypatch.setattr(_dispatch, "MODE", mode)
    norm, fc1, fc2, x = parts()
    x.requires_grad_()
    out, leaves = norm_mlp(x, norm, fc1, fc2, add=True), [x, *fc1.parameters(), *fc2.parameters()]
    first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(out.square().sum(), leaves), first, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_a_second_derivative_is_refused():
    norm, fc1, fc2, x = parts()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(norm_mlp(x, norm, fc1, fc2, add=True).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
