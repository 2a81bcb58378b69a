"""Attention whose backward pass is plain products, a few images at a time: for bf16 on a CPU.

PyTorch's fused kernel is the fastest forwards there, but not backwards (benchmarks/attention.py).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.kernels.softmax_gradient import softmax_gradient
from fastmim.models.tracing import wants_plain_operators

SCORES_BYTES = 3 * 2**20
"""Scores at a time on a CPU, whose cache is to hold them from one product to the next."""


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over all tokens, whose backward pass computes scores again, rounded to `q`'s dtype.

    Args:
        q: [B, N, heads, d].
        k, v: [B, M, heads, d].

    Returns:
        [B, N, heads, d], in the dtype of `q`.
    """
    if wants_plain_operators():  # a compiler chooses what is kept
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return (scores.softmax(-1) @ v).transpose(1, 2)
    return _MatmulAttention.apply(q, k, v)


def matmul_self_attention(qkv: Tensor) -> Tensor:
    """As `matmul_attention` of qkv [B, N, 3, heads, d], whose gradient is one tensor too: nothing is put together."""
    if wants_plain_operators():
        return matmul_attention(*qkv.unbind(2))
    return _MatmulAttention.apply(qkv)


class _MatmulAttention(torch.autograd.Function):
    """Keeps queries, keys and values as they are given, in three tensors or one; backwards copies a few images."""

    @staticmethod
    def forward(ctx, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        q, k, v = (x.transpose(1, 2) for x in _split(given))
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        given = ctx.saved_tensors
        q, k, v = _split(given)
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in given)
        grad_q, grad_k, grad_v = _split(grads)
        scale = q.shape[-1] ** -0.5
        for part in _parts(q, k):
            mq, mk, mv, mgrad = (_matrices(x[part]) for x in (q, k, v, grad))
            scores = _scaled_product(mq, mk.transpose(1, 2), scale)
            probabilities, scores = softmax_gradient(scores, mgrad @ mv.transpose(1, 2))
            grad_v[part] = _tokens(probabilities.transpose(1, 2) @ mgrad, v)
            grad_q[part] = _tokens(_scaled_product(scores, mk, scale), q)
            grad_k[part] = _tokens(_scaled_product(scores.transpose(1, 2), mq, scale), k)
        return grads


def _split(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Queries, keys and values, [B, N, heads, d] each."""
    return given[0].unbind(2) if len(given) == 1 else given


def _parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Images whose scores are `SCORES_BYTES`, at least one; all of them on a GPU."""
    image = q.shape[2] * q.shape[1] * k.shape[1] * q.element_size()
    step = max(1, SCORES_BYTES // image) if q.device.type == "cpu" else len(q)
    return (slice(start, start + step) for start in range(0, len(q), step))


def _matrices(x: Tensor) -> Tensor:
    """[b, N, heads, d] -> [b * heads, N, d], whose matrices are contiguous."""
    return x.transpose(1, 2).contiguous().flatten(0, 1)


def _tokens(x: Tensor, like: Tensor) -> Tensor:
    """[b * heads, N, d] -> [b, N, heads, d], a view; `like` has so many heads."""
    return x.unflatten(0, (-1, like.shape[2])).transpose(1, 2)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
