"""What is dropped and computed again: memory, gradients, and how it goes together with checkpoints and a compiler."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fastmim.models.blocks import Blocks
from fastmim.models.recompute import kept_instead, recompute


class Calls:
    """GELU, counted."""

    def __init__(self):
        self.count = 0

    def __call__(self, x):
        self.count += 1
        return F.gelu(x)


def network(x, weight, context=kept_instead):
    """A GELU and two linears that read it, one of them through a view."""
    gelu = Calls()
    active = gelu(x)
    with context(active, gelu, x):
        return active @ weight + F.linear(active.flatten(0, 1), weight).view_as(x), gelu


def setup():
    torch.manual_seed(0)
    return torch.randn(3, 5, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)


def test_gradients_are_bitwise_those_of_what_is_kept():
    x, weight = setup()
    out, gelu = network(x, weight)
    assert gelu.count == 1
    actual = torch.autograd.grad(out.square().sum(), (x, weight))
    assert gelu.count == 3  # each linear asked for it
    expected, _ = network(x, weight, lambda *_: contextlib.nullcontext())
    for got, wanted in zip(actual, torch.autograd.grad(expected.square().sum(), (x, weight)), strict=True):
        assert torch.equal(got, wanted)


def test_the_tensor_is_freed_and_others_of_its_size_are_kept():
    x, weight = setup()
    active, like = F.gelu(x), torch.randn_like(x)
    address, packed = active.untyped_storage()._cdata, []
    context = kept_instead(active, F.gelu, x)
    pack = context.pack_hook
    context.pack_hook = lambda saved: packed.append(pack(saved)) or packed[-1]
    with context:
        (active @ weight + active * like).sum().backward()
    tensors = [value for value in packed if isinstance(value, torch.Tensor)]
    assert len(packed) > len(tensors) and all(value.untyped_storage()._cdata != address for value in tensors)
    assert any(value.shape == like.shape and torch.equal(value, like) for value in tensors)


def test_within_a_checkpoint_nothing_is_dropped_twice():
    x, weight = setup()
    gelu, saved = Calls(), []

    def block(x, weight):
        active = gelu(x)
        with kept_instead(active, gelu, x):
            return active @ weight

    with saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        out = recompute(block, x, weight)
    assert sum(saved) <= x.numel() + weight.numel()
    actual = torch.autograd.grad(out.square().sum(), (x, weight))
    assert gelu.count == 2
    expected = F.gelu(x) @ weight
    for got, wanted in zip(actual, torch.autograd.grad(expected.square().sum(), (x, weight)), strict=True):
        assert torch.equal(got, wanted)
    assert isinstance(kept_instead(x, F.gelu, x), saved_tensors_hooks)  # again, outside


@pytest.mark.parametrize("why", ["no gradient", "frozen"])
def test_where_nothing_is_kept_nothing_changes(why):
    x, _ = setup()
    with torch.no_grad() if why == "no gradient" else contextlib.nullcontext():
        active = F.gelu(x.detach() if why == "frozen" else x)
        assert isinstance(kept_instead(active, F.gelu, x), contextlib.nullcontext)
        assert recompute(lambda value: value * 2, x.detach()).equal(x.detach() * 2)


def test_on_cuda_what_is_computed_is_kept():
    with FakeTensorMode():
        x = torch.empty(3, 4, device="cuda", requires_grad=True)
        assert isinstance(kept_instead(x * 2, F.gelu, x), contextlib.nullcontext)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks
def test_a_compiled_block_has_the_gradients_of_one_that_is_not():
    torch.manual_seed(0)
    plain, compiled = Blocks(32, 2, 4), Blocks(32, 2, 4)
    compiled.load_state_dict(plain.state_dict())
    torch.compiler.reset()
    for layer in compiled.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 7, 32)
    for blocks in (plain, compiled):
        blocks(x).square().sum().backward()
    torch.compiler.reset()
    for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
