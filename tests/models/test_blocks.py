"""Blocks: against timm's, with kernels and compiled, activation checkpointing and drop path; the position table."""

import copy
import functools

import pytest
import torch
from fastmim.kernels import _dispatch
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from fastmim.models import blocks as blocks_module
from fastmim.models.blocks import Blocks, init_weights
from fastmim.models.position import sincos_positions
from tests.kernels.kernel_testing import assert_error_budget


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched, in Triton's interpreter."""
    names, launch = [], _dispatch.launch
    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    monkeypatch.setattr(
        _dispatch,
        "launch",
        lambda function, *args, **kwargs: (
            names.append(function.__name__),
            launch(function, *args, **kwargs),
        ),
    )
    return names


def timm_blocks(width, depth, heads):
    """timm's blocks, one after the other."""
    layers = [
        TimmBlock(
            width,
            heads,
            qkv_bias=True,
            attn_layer=TimmAttention,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        )
        for _ in range(depth)
    ]
    return nn.Sequential(*layers)


def results(blocks, x, grad, dtype, forward=lambda blocks, x: blocks(x)):
    """Output, gradient of the input and of every parameter."""
    blocks = copy.deepcopy(blocks).to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    out = forward(blocks, x)
    out.backward(grad.to(dtype))
    return [out.detach(), x.grad, *(parameter.grad for parameter in blocks.parameters())]


def setup(checkpointing=False):
    """Our blocks and timm's with the same random weights, an input and an output's gradient."""
    ours, theirs = Blocks(32, 3, 4, checkpointing=checkpointing), timm_blocks(32, 3, 4)
    ours.apply(init_weights)
    for parameter in ours.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5)
    theirs.load_state_dict({name.removeprefix("layers."): value for name, value in ours.state_dict().items()})
    return ours, theirs, torch.randn(2, 7, 32), torch.randn(2, 7, 32)


def require_timms(checkpointing):
    """Our float32 results are as near to float64 as timm's are."""
    ours, theirs, x, grad = setup(checkpointing)
    actual = results(ours, x, grad, torch.float32)
    native = results(theirs, x, grad, torch.float32)
    exact = results(theirs, x, grad, torch.float64)
    for got, expected, truth in zip(actual, native, exact, strict=True):
        assert_error_budget(got, expected, truth)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_kernels_they_are_timms(checkpointing):
    require_timms(checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_kernels_they_are_timms_within_float32(launched, checkpointing):
    require_timms(checkpointing)
    # Closed for the checkpoint, each block adds its first summand by itself, and its forward pass runs twice.
    norms, times = (3, 2) if checkpointing else (5, 1)
    assert launched.count("_add_layer_norm_forward_kernel") == norms * times
    assert launched.count("_add_layer_norm_backward_kernel") == norms


@pytest.mark.parametrize("checkpointing", [False, True])
def test_patches_that_are_asked_for_are_those_of_all(checkpointing, monkeypatch):
    ours, theirs, x, _ = setup(checkpointing)
    ids, grad = torch.tensor([[4, 0, 5], [1, 3, 2]]), torch.randn(2, 3, 32)  # behind a cls token
    rows = (ids + 1)[..., None].expand(-1, -1, 32)
    found = results(ours, x, grad, torch.float64, lambda blocks, x: blocks(x, ids=ids))
    wanted = results(theirs, x, grad, torch.float64, lambda blocks, x: blocks(x).gather(1, rows))
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected)
    mlp, tokens = blocks_module.norm_mlp, []

    def counted(x, *args, **options):
        tokens.append(x.shape[1])
        return mlp(x, *args, **options)

    monkeypatch.setattr(blocks_module, "norm_mlp", counted)
    ours(x, ids=ids)
    assert tokens == [7, 7, 3]


@torch.no_grad()
def test_a_compiler_is_given_plain_operators_and_one_graph_for_equal_blocks(launched):
    blocks, graphs = Blocks(32, 10, 4), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    for layer in blocks.layers:
        layer.compile(backend=count)
    x = torch.randn(2, 7, 32)
    compiled = blocks(x)
    assert len(graphs) == 2 and not launched  # the first block has one summand, all others two
    torch.compiler.reset()
    plain = Blocks(32, 10, 4)
    plain.load_state_dict(blocks.state_dict())
    torch.testing.assert_close(compiled, plain(x))


def test_checkpointing_changes_memory_only():
    torch.manual_seed(0)
    plain, saving = Blocks(32, 3, 4), Blocks(32, 3, 4, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    plain(x).square().sum().backward()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        result = saving(y)
    result.square().sum().backward()
    # One input per block is stored; its scores, its MLP's hidden layer and the rest are not.
    assert sum(saved) <= 3 * x.numel() + result.numel()
    torch.testing.assert_close(x.grad, y.grad)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_drop_path_rises_with_depth_and_acts_in_training_only():
    blocks = Blocks(32, 3, 4, drop_path=0.5)
    rates = [getattr(layer.drop_path1, "drop_prob", 0.0) for layer in blocks.layers]
    assert rates == pytest.approx([0.0, 0.25, 0.5])
    x = torch.randn(64, 5, 32)
    blocks.train()
    assert not torch.equal(blocks(x), blocks(x))
    blocks.eval()
    assert torch.equal(blocks(x), blocks(x))


def test_drop_path_draws_the_same_with_kernels(launched):
    blocks, x = Blocks(32, 3, 4, drop_path=0.5), torch.randn(16, 5, 32)
    drawn = []
    for mode in ("interpret", "reference"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_dispatch, "MODE", mode)
            torch.manual_seed(1)
            drawn.append(blocks(x))
    assert launched
    torch.testing.assert_close(*drawn)


def test_position_table_is_zero_for_cls_and_distinct_elsewhere():
    table = sincos_positions(16, (3, 5))
    assert table.shape == (1, 16, 16) and table.dtype == torch.float32
    assert not table[0, 0].any()
    assert len(table[0, 1:].unique(dim=0)) == 15
    # Two patches of one column share the first half, two of one row the second.
    grid = table[0, 1:].view(3, 5, 16)
    assert torch.equal(grid[0, 2, :8], grid[2, 2, :8]) and torch.equal(grid[1, 0, 8:], grid[1, 4, 8:])


def test_rates_of_stochastic_depth_are_numbers_of_a_model_on_meta_too():
    with torch.device("meta"):
        assert blocks_module.drop_path_rates(0.2, 3) == pytest.approx([0.0, 0.1, 0.2])
