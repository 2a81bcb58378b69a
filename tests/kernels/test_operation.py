"""Who sees an operation, and that it is the same on both ways."""

import inspect

import pytest
import torch
from fastmim.kernels import bias_gelu, gather_tokens, sample_random_mask
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    """Notes the operations of fastmim that PyTorch's dispatcher is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastmim":
            self.seen.append(function._schema.name.removeprefix("fastmim::"))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def dispatched(monkeypatch):
    """The operations that went through the dispatcher."""
    names, original = [], torch.library.CustomOpDef.__call__

    def call(operation, *args):
        names.append(operation._name)
        return original(operation, *args)

    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", call)
    return names


def step(x, bias):
    out = bias_gelu(x, bias)
    return out, *torch.autograd.grad(out.sum(), [x, bias])


def setup():
    return torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)


def test_a_plain_call_skips_the_dispatcher_and_computes_the_same(dispatched):
    inputs = setup()
    plain = step(*inputs)
    assert plain[0].grad_fn is not None and not dispatched
    with Names() as mode:
        seen = step(*inputs)
    assert mode.seen == dispatched == ["bias_gelu", "bias_gelu_backward"]
    assert all(map(torch.equal, plain, seen))


def test_a_call_inspects_no_signature(monkeypatch):
    """PyTorch does for a function with a `setup_context` of its own, which takes longer than the call."""
    looked_at = []
    monkeypatch.setattr(inspect, "signature", lambda function: looked_at.append(function))
    assert step(*setup())[0].grad_fn is not None
    assert not looked_at


def test_without_gradients_there_is_no_graph(dispatched):
    x, bias = setup()
    with torch.no_grad():
        assert bias_gelu(x, bias).grad_fn is None
    assert bias_gelu(x.detach(), bias.detach()).grad_fn is None
    positions = torch.arange(2)
    assert not any(ids.requires_grad for ids in sample_random_mask(0, positions, positions, 9, 3))
    assert not dispatched


def test_fake_meta_and_subclass_tensors_are_seen(dispatched):
    x, ids = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 2]])
    with FakeTensorMode() as mode:
        fake = gather_tokens(mode.from_tensor(x), mode.from_tensor(ids))
    assert fake.shape == (2, 2, 3)
    assert bias_gelu(torch.empty(3, 5, device="meta"), torch.empty(5, device="meta")).is_meta
    bias_gelu(torch.randn(3, 5).as_subclass(Subclass), torch.randn(5))
    assert dispatched == ["gather_tokens", "bias_gelu", "bias_gelu"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # no batching rule
def test_transforms_of_torch_func_are_seen(dispatched):
    x, ids = torch.randn(4, 2, 5, 3), torch.tensor([[4, 0], [1, 2]])
    expected = torch.stack([gather_tokens(sample, ids) for sample in x])
    assert not dispatched
    assert torch.equal(torch.vmap(lambda sample: gather_tokens(sample, ids))(x), expected)
    assert dispatched == ["gather_tokens"]


def test_what_has_no_gradient_is_not_differentiated():
    x, bias = setup()
    (grad,) = torch.autograd.grad(bias_gelu(x, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastmim\.bias_gelu_backward|fastmim::bias_gelu_backward"):
        torch.autograd.grad(grad.sum(), x)


def test_the_adjoints_differentiate_each_other_twice():
    x, ids = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([[2, 0]])
    assert torch.autograd.gradgradcheck(lambda x: gather_tokens(x, ids), x)
