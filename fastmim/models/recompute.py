"""Activation checkpointing."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable, *inputs: Tensor):
    """Call a block, which keeps its inputs alone for the backward pass and is computed once more there.

    Args:
        function: of tensors; its result is returned.
        inputs: of `function`.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)
