"""C for a CPU: what compiles it, for which processors, and what happens where nothing does."""

import logging

import pytest
import torch
import torch.nn.functional as F
from fastmim.kernels import _dispatch, _native
from fastmim.kernels.adamw_halves import NativeAdamW
from fastmim.kernels.block_rows import gelu_rows
from fastmim.kernels.softmax_gradient import softmax_gradient
from torch import nn

from fastmim.split_adamw import SplitAdamW

LEVELS = ["DEFAULT", "AVX2", "AVX512"]
OWN = torch.backends.cpu.get_cpu_capability()
RUNNABLE = LEVELS[: LEVELS.index(OWN) + 1] if OWN in LEVELS else [OWN]
"""What this processor runs: its own level, and those below it."""


@pytest.fixture
def nothing_compiled(monkeypatch):
    """C is compiled anew, now and by the next test."""
    monkeypatch.setattr(_dispatch, "MODE", "auto")
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


@pytest.mark.parametrize("capability", RUNNABLE)
def test_c_of_every_processor_computes_the_same(nothing_compiled, monkeypatch, caplog, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    torch.manual_seed(0)
    scores, grad = torch.randn(5, 37).bfloat16(), torch.randn(5, 37).bfloat16()
    start, gradient = torch.randn(5000).bfloat16(), torch.randn(5000).bfloat16()
    wanted, hidden = scores.double().softmax(-1), torch.randn(5, 37)
    with caplog.at_level(logging.INFO, "fastmim.kernels"):
        found, _ = softmax_gradient(scores, grad)
        active = gelu_rows(hidden, torch.ones(37), torch.empty_like(hidden))
        parameter = nn.Parameter(start.clone())
        optimizer = SplitAdamW([{"params": [parameter]}], lr=1e-4)
    assert caplog.text.count(f"compiled for {capability}") == 3 and found is scores
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(active, F.gelu(hidden + 1), rtol=1e-5, atol=1e-6)
    parameter.grad = gradient
    optimizer.step()
    # The first step of AdamW goes by the learning rate, against the gradient's sign.
    step = optimizer.masters[parameter].detach() - start.float()
    torch.testing.assert_close(step, -1e-4 * gradient.sign().float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("compiler", ["", "gcc -g"])
def test_the_compiler_may_be_named(nothing_compiled, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert NativeAdamW.load() is not None


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("no-such-compiler -x", "'no-such-compiler'"),
        ("false", "exit status 1"),
        ("'gcc", "No closing quotation"),
    ],
)
def test_without_a_compiler_plain_pytorch_steps_and_it_is_told(
    nothing_compiled, monkeypatch, caplog, compiler, told
):
    monkeypatch.setenv("CC", compiler)
    parameter = nn.Parameter(torch.ones(3).bfloat16())
    with caplog.at_level(logging.WARNING, "fastmim.kernels"):
        optimizer = SplitAdamW([{"params": [parameter]}], lr=1e-4)
    assert "adamw_halves.c runs as plain PyTorch" in caplog.text and told in caplog.text
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(optimizer.masters[parameter].detach(), torch.full((3,), 1 - 1e-4))
