"""Blocks: activation checkpointing and drop path, and the position table."""

import pytest
import torch

from fastmim.models.blocks import Blocks
from fastmim.models.position import sincos_positions


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


def test_position_table_is_zero_for_cls_and_distinct_elsewhere():
    table = sincos_positions(16, (3, 5))
    assert table.shape == (1, 16, 16) and table.dtype == torch.float32
    assert not table[0, 0].any()
    assert len(table[0, 1:].unique(dim=0)) == 15
    # Two patches of one column share the first half, two of one row the second.
    grid = table[0, 1:].view(3, 5, 16)
    assert torch.equal(grid[0, 2, :8], grid[2, 2, :8]) and torch.equal(grid[1, 0, 8:], grid[1, 4, 8:])
