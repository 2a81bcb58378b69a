"""Attention as two matrix products and a softmax, a few images at a time: for bf16 on a CPU."""

from collections.abc import Iterator

import torch
from torch import Tensor

SCORES_BYTES = 3 * 2**20
"""Scores at a time on a CPU, whose cache is to hold them from one product to the next."""


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over all tokens, whose backward pass computes the scores again.

    Args:
        q: [B, N, heads, d].
        k, v: [B, M, heads, d].

    Returns:
        [B, N, heads, d], in the dtype of `q`; the softmax is rounded to it.
    """
    if torch.compiler.is_compiling():  # which chooses what is kept
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return (scores.softmax(-1) @ v).transpose(1, 2)
    return _MatmulAttention.apply(q, k, v)


class _MatmulAttention(torch.autograd.Function):
    """Keeps queries, keys and values, a matrix for each head of each image."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        images, _, ctx.heads, dim = q.shape
        ctx.scale = dim**-0.5
        q, k, v = (_matrices(x) for x in (q, k, v))
        ctx.save_for_backward(q, k, v)
        out = torch.empty_like(q)
        for part in _parts(q, k, ctx.heads):
            torch.bmm(_probabilities(q[part], k[part], ctx.scale), v[part], out=out[part])
        return _tokens(out, images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        images, grad = len(grad), _matrices(grad)
        grads = grad_q, grad_k, grad_v = [torch.empty_like(x) for x in (q, k, v)]
        for part in _parts(q, k, ctx.heads):
            probabilities = _probabilities(q[part], k[part], ctx.scale)
            torch.bmm(probabilities.transpose(1, 2), grad[part], out=grad_v[part])
            scores = torch.bmm(grad[part], v[part].transpose(1, 2))
            scores = torch._softmax_backward_data(scores, probabilities, -1, scores.dtype)
            _scaled_product(scores, k[part], ctx.scale, grad_q[part])
            _scaled_product(scores.transpose(1, 2), q[part], ctx.scale, grad_k[part])
        return tuple(_tokens(x, images) for x in grads)


def _parts(q: Tensor, k: Tensor, heads: int) -> Iterator[slice]:
    """Matrices of whole images whose scores are `SCORES_BYTES`, at least of one; all of them on a GPU."""
    image = heads * q.shape[1] * k.shape[1] * q.element_size()
    step = heads * max(1, SCORES_BYTES // image) if q.device.type == "cpu" else len(q)
    return (slice(start, start + step) for start in range(0, len(q), step))


def _matrices(x: Tensor) -> Tensor:
    """[B, N, heads, d] -> [B * heads, N, d], whose matrices are contiguous."""
    return x.transpose(1, 2).contiguous().flatten(0, 1)


def _tokens(x: Tensor, images: int) -> Tensor:
    """[B * heads, N, d] -> [B, N, heads, d], a view."""
    return x.unflatten(0, (images, -1)).transpose(1, 2)


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return _scaled_product(q, k.transpose(1, 2), scale).softmax(-1)


def _scaled_product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale a b, scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale, out=out)
