"""Blocks by rows or by their modules: the same results, and who is in charge of a module decides."""

import copy

import pytest
import torch
from torch import nn

from fastmim.models import blocks
from fastmim.models.blocks import Blocks
from fastmim.models.by_rows import runs_by_rows
from tests.models.test_by_rows import WIDTH, parts


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize("asked", [None, [[3, 1], [0, 5]]])
def test_blocks_compute_what_their_modules_do(monkeypatch, drop_path, attention, asked):
    torch.manual_seed(0)
    stack = Blocks(WIDTH, 3, 4, drop_path=drop_path, attention=attention).double()
    modules = copy.deepcopy(stack)
    x, ids = torch.randn(2, 7, WIDTH, dtype=torch.float64), None if asked is None else torch.tensor(asked)
    found = []
    for one in (stack, modules):
        torch.manual_seed(1)  # of stochastic depth
        given = x.clone().requires_grad_()
        out = one(given, ids=ids)
        out.square().sum().backward()
        found.append([out, given.grad, *(parameter.grad for parameter in one.parameters())])
        monkeypatch.setattr(blocks, "runs_by_rows", lambda *_: False)
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_modules_run_where_something_else_is_in_charge():
    norm, fc1, _, x = parts()
    assert runs_by_rows(x, norm, fc1)
    assert not runs_by_rows(x.to("meta"), norm)
    assert not runs_by_rows(x.bfloat16(), norm)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_by_rows(x, norm)
    fc1.weight.ds_id = 0  # as ZeRO-3 marks what it shards
    assert runs_by_rows(x, norm) and not runs_by_rows(x, norm, fc1)
    assert not torch.compile(lambda: runs_by_rows(x, norm), backend="eager", fullgraph=True)()
    torch.compiler.reset()


class Adapted(nn.Linear):
    """A linear with a low-rank addition, as adapters have it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.down, self.up = (
            nn.Parameter(torch.randn(2, n)) for n in (linear.in_features, linear.out_features)
        )

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Scaled(blocks.AddLayerNorm):
    """A norm of somebody else, which is one of ours by its class's ancestors alone."""

    def forward(self, x, branch=None):
        normed, x = super().forward(x, branch)
        return 2 * normed, x


REPLACED = {
    **{path: Adapted for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
    **{"mlp.fc1 ": lambda fc1: nn.Linear(WIDTH, fc1.out_features), "mlp": Doubled},
    **{"mlp ": lambda mlp: nn.Identity(), "norm2": lambda norm: Scaled(WIDTH)},
}


@pytest.mark.parametrize(("path", "make"), REPLACED.items(), ids=map(str.strip, REPLACED))
def test_what_somebody_put_in_a_part_s_place_is_called(monkeypatch, path, make):
    torch.manual_seed(0)
    stack, x = Blocks(WIDTH, 1, 4), torch.randn(2, 7, WIDTH)
    before = stack(x)
    owner, _, name = path.strip().rpartition(".")
    owner = stack.layers[0].get_submodule(owner)
    setattr(owner, name, make(getattr(owner, name)))
    found = stack(x)
    assert not torch.allclose(found, before)
    monkeypatch.setattr(blocks, "runs_by_rows", lambda *_: False)
    torch.testing.assert_close(found, stack(x))


@pytest.mark.parametrize(
    "path", ["norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2"]
)
def test_hooks_are_called(path):
    block, calls = Blocks(WIDTH, 1, 4), []
    module = block.layers[0].get_submodule(path)
    handles = [
        module.register_forward_pre_hook(lambda *_: calls.append("before")),
        module.register_forward_hook(lambda *_: calls.append("after")),
    ]
    block(torch.randn(2, 7, WIDTH))
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert runs_by_rows(torch.randn(2, 7, WIDTH), module)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not runs_by_rows(torch.randn(2, 7, WIDTH), module)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_transforms_and_tracers_see_plain_operators(attention):
    torch.manual_seed(0)
    block, x = Blocks(WIDTH, 1, 4, attention=attention), torch.randn(2, 7, WIDTH)
    parameters = dict(block.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(block, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    loss(parameters, x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)
    assert torch.allclose(torch.jit.trace(block, x)(x), block(x), atol=1e-6)
