"""What a forward pass need not keep for the backward pass, which can compute it again."""

import contextlib
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

_inside = threading.local()


def recompute(function: Callable, *inputs: Tensor):
    """Call a block, which keeps its inputs alone for the backward pass and is computed once more there.

    Args:
        function: of tensors; its result is returned.
        inputs: of `function`.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(functools.partial(_call, function), *inputs, use_reentrant=False)


def _call(function: Callable, *inputs: Tensor):
    outer, _inside.recompute = getattr(_inside, "recompute", False), True
    try:
        return function(*inputs)
    finally:
        _inside.recompute = outer


def kept_instead(
    tensor: Tensor, again: Callable[..., Tensor], *inputs: Tensor
) -> contextlib.AbstractContextManager:
    """In this context operations that need `tensor` for their backward pass keep `inputs`, and compute it from them.

    Worth it where the inputs are kept anyway and the computation is a pass over memory: LayerNorm, GELU. Nothing
    changes under a compiler, which makes this choice by itself, nor inside `recompute`, which keeps neither, nor on
    CUDA, where the passes cost time and memory is saved by activation checkpointing, where it is short.

    Args:
        tensor: what is not kept, `again(*inputs)`; it has to live as long as the context does.
        again: called without gradients, once for each operation that needs the tensor.
        inputs: of `again`; not to be changed in place before the backward pass, which would not notice.
    """
    kept = tensor.is_cuda or not tensor.requires_grad or getattr(_inside, "recompute", False)
    if torch.compiler.is_compiling() or kept:
        return contextlib.nullcontext()
    storage, numbers = tensor.untyped_storage()._cdata, tensor.numel()
    inputs = tuple(value.detach() for value in inputs)

    def pack(saved: Tensor) -> Tensor | torch.Size:
        # A linear keeps its input as a matrix.
        same = saved.untyped_storage()._cdata == storage and saved.numel() == numbers
        return saved.shape if same else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else again(*inputs).view(packed)

    return saved_tensors_hooks(pack, unpack)
