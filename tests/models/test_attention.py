"""Every attention backend against a float64 transcription, and the choice among them."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from fastmim import kernels
from fastmim.errors import ConfigError
from fastmim.models import attention, matmul_attention
from fastmim.models.attention import (
    Attention,
    attend,
    choose_attention,
    self_attend,
    xformers_refusal,
)


def exact_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, head by head."""
    result = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h].T / q.shape[-1] ** 0.5
            result[b, :, h] = torch.softmax(scores, dim=-1) @ v[b, :, h]
    return result


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "matmul of two images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", [37, 20])
def test_backends_compute_attention_and_its_gradient(monkeypatch, backend, dtype, read):
    torch.manual_seed(0)
    inputs = [torch.randn(5, tokens, 3, 16, dtype=torch.float64) for tokens in (37, read, read)]
    weight = torch.randn(5, 37, 3, 16, dtype=torch.float64)
    if backend not in ("sdpa", "matmul"):
        monkeypatch.setattr(matmul_attention, "SCORES_BYTES", 2 * 3 * 37 * read * dtype.itemsize)
        backend = "matmul"
    exact = [x.clone().requires_grad_() for x in inputs]
    got = [x.to(dtype).requires_grad_() for x in inputs]
    want = exact_attention(*exact)
    have = attend(*got, backend)
    assert have.dtype == dtype
    (want * weight).sum().backward()
    (have.double() * weight).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_take_queries_keys_and_values_in_one_tensor(monkeypatch, dtype):
    torch.manual_seed(0)
    monkeypatch.setattr(matmul_attention, "SCORES_BYTES", 2 * 3 * 37 * 37 * dtype.itemsize)
    exact = torch.randn(5, 37, 3, 3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 37, 3, 16, dtype=torch.float64)
    got = exact.detach().to(dtype).requires_grad_()
    want, have = exact_attention(*exact.unbind(2)), matmul_attention.matmul_self_attention(got)
    (want * weight).sum().backward()
    (have.double() * weight).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("packed", [False, True])
def test_products_keep_no_scores(packed):
    qkv, saved = torch.randn(2, 37, 3, 3, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        if packed:
            matmul_attention.matmul_self_attention(qkv)
        else:
            attend(*qkv.unbind(2), "matmul")
    assert sum(saved) == qkv.numel()


def test_autocast_leaves_products_as_they_are():
    qkv = torch.randn(2, 5, 3, 2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = matmul_attention.matmul_self_attention(qkv)
    found.sum().backward()
    assert found.dtype == torch.float32 and qkv.grad.isfinite().all()
    torch.testing.assert_close(found, exact_attention(*qkv.unbind(2)))


def test_module_has_timms_parameters_and_result():
    from timm.layers.attention import Attention as TimmAttention

    torch.manual_seed(0)
    theirs = TimmAttention(32, num_heads=4, qkv_bias=True)
    x = torch.randn(2, 9, 32)
    for backend in ("sdpa", "matmul"):
        ours = Attention(32, num_heads=4, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.fixture
def choose():
    choose_attention.cache_clear()
    yield choose_attention
    choose_attention.cache_clear()


@pytest.fixture
def xformers(monkeypatch):
    """Replace xformers' operator, which computes on CUDA only; the trial's tensors are made on the CPU."""

    def install(operator):
        monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=operator))

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device, **options: zeros(*sizes, **options))
    return install


def test_auto_chooses_what_is_fastest_and_says_so_once(choose, caplog):
    caplog.set_level(logging.INFO, logger="fastmim")
    logging.getLogger("fastmim").propagate = True
    assert choose("auto", "cpu", "fp32") == "sdpa"
    assert choose("auto", "cpu", "bf16") == "matmul"
    assert choose("auto", "cuda", "bf16") == "short"
    assert choose("auto", "cuda", "fp32") == "sdpa"
    assert choose("sdpa", "cuda", "bf16") == "sdpa"
    assert choose("auto", "cpu", "fp32") == "sdpa"
    assert caplog.messages == [
        "attention: sdpa (PyTorch's own)",
        "attention: matmul (faster than sdpa in bf16 on a CPU)",
        "attention: short (a kernel for up to 64 tokens, sdpa for more)",
        "attention: sdpa (PyTorch's own)",
        "attention: sdpa (asked for)",
    ]


def test_xformers_is_tried_before_training(choose, xformers):
    xformers(lambda q, k, v: q + k + v)
    assert choose("xformers", "cuda", "bf16") == "xformers"


def test_xformers_without_an_operator_is_refused(choose, xformers):
    def refuse(q, k, v):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    xformers(refuse)
    why = "xformers has no bf16 operator here, `python -m xformers.info` tells why; expected auto or sdpa"
    with pytest.raises(ConfigError, match=f"train.attention='xformers': {why}"):
        choose("xformers", "cuda", "bf16")


def test_xformers_is_refused_where_it_cannot_run(choose):
    with pytest.raises(ConfigError, match=r"train.attention='xformers' on cpu: it runs on CUDA only"):
        choose("xformers", "cpu")


@pytest.mark.parametrize("where", [("cpu", "bf16"), ("cuda", "fp32")])
def test_the_kernel_is_refused_where_it_is_none(choose, where):
    with pytest.raises(
        ConfigError, match=rf"train.attention='short' in {where[1]} on {where[0]}: it runs on"
    ):
        choose("short", *where)


@pytest.mark.parametrize(("tokens", "head"), [(50, 64), (64, 16), (65, 64), (50, 80)])
def test_what_the_kernel_cannot_hold_is_pytorchs(monkeypatch, tokens, head):
    called = []
    monkeypatch.setattr(
        attention, "short_attention", lambda qkv: called.append(qkv.shape) or kernels.short_attention(qkv)
    )
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 2, head)
    torch.testing.assert_close(self_attend(qkv, "short"), self_attend(qkv, "sdpa"))
    assert bool(called) == (tokens <= 64 and head <= 64)


@pytest.mark.gpu
def test_xformers_agrees_with_sdpa_or_is_refused(choose):
    if xformers_refusal("bf16"):
        with pytest.raises(ConfigError, match=r"train.attention='xformers': xformers"):
            choose("xformers", "cuda", "bf16")
        return
    q, k, v = (torch.randn(2, 50, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    torch.testing.assert_close(attend(q, k, v, "xformers"), attend(q, k, v, "sdpa"), rtol=2e-2, atol=2e-2)
