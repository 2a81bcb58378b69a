"""Self-attention of a few tokens, whose scores one program holds: an encoder that sees visible patches only."""

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation

MAX_TOKENS = 64
"""Tokens whose scores, and their gradient, fit the registers of a program."""

MAX_HEAD = 64
"""Widest head."""


def short_attention_reference(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v. qkv [B, N, 3, H, d] -> [B, N, H, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q * qkv.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@kernel
def _places(tokens, head, BLOCK: tl.constexpr, BLOCK_HEAD: tl.constexpr):
    """A head's tile in a tensor of tokens: rows, columns, and which of them exist."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_HEAD)[None, :]
    return row, column, (row < tokens) & (column < head)


@kernel
def _exponentials(scores, scale, exists, axis: tl.constexpr):
    """Of scaled scores less their greatest along an axis; 0 where the key does not exist."""
    scores = tl.where(exists, scores * (scale * 1.4426950408889634), float("-inf"))
    return tl.exp2(scores - tl.expand_dims(tl.max(scores, axis), axis))


@kernel
def _short_attention_forward_kernel(
    qkv, out, scale, tokens, heads, head, BLOCK: tl.constexpr, BLOCK_HEAD: tl.constexpr
):
    sample, which = tl.program_id(0) // heads, tl.program_id(0) % heads
    width = heads * head
    row, column, exists = _places(tokens, head, BLOCK, BLOCK_HEAD)
    q_at = qkv + sample.to(tl.int64) * tokens * 3 * width + which * head + row * 3 * width + column
    q = tl.load(q_at, mask=exists, other=0.0)
    k = tl.load(q_at + width, mask=exists, other=0.0)
    v = tl.load(q_at + 2 * width, mask=exists, other=0.0)
    scores = tl.dot(q, tl.trans(k))
    weights = _exponentials(scores, scale, (tl.arange(0, BLOCK) < tokens)[None, :], axis=1)
    total = tl.sum(weights, axis=1)
    values = tl.dot(weights.to(v.dtype), v) / total[:, None]
    out_at = out + sample.to(tl.int64) * tokens * width + which * head + row * width + column
    tl.store(out_at, values.to(out.dtype.element_ty), mask=exists)


@kernel
def _short_attention_backward_kernel(
    qkv, grad, grad_qkv, scale, tokens, heads, head, BLOCK: tl.constexpr, BLOCK_HEAD: tl.constexpr
):
    sample, which = tl.program_id(0) // heads, tl.program_id(0) % heads
    width = heads * head
    row, column, exists = _places(tokens, head, BLOCK, BLOCK_HEAD)
    at = sample.to(tl.int64) * tokens * 3 * width + which * head + row * 3 * width + column
    q = tl.load(qkv + at, mask=exists, other=0.0)
    k = tl.load(qkv + at + width, mask=exists, other=0.0)
    v = tl.load(qkv + at + 2 * width, mask=exists, other=0.0)
    grad_at = sample.to(tl.int64) * tokens * width + which * head + row * width + column
    upstream = tl.load(grad + grad_at, mask=exists, other=0.0)
    # Keys by queries: three of the products then take a factor as it lies in registers. Queries that do not exist have
    # an upstream of 0 and add nothing.
    scores = tl.dot(k, tl.trans(q))
    weights = _exponentials(scores, scale, (tl.arange(0, BLOCK) < tokens)[:, None], axis=0)
    weights /= tl.expand_dims(tl.sum(weights, axis=0), 0)
    grad_v = tl.dot(weights.to(v.dtype), upstream)
    tl.store(grad_qkv + at + 2 * width, grad_v.to(grad_qkv.dtype.element_ty), mask=exists)
    grad_weights = tl.dot(v, tl.trans(upstream))
    along = tl.expand_dims(tl.sum(weights * grad_weights, axis=0), 0)
    grad_scores = (weights * (grad_weights - along) * scale).to(q.dtype)
    grad_k = tl.dot(grad_scores, q)
    tl.store(grad_qkv + at + width, grad_k.to(grad_qkv.dtype.element_ty), mask=exists)
    grad_q = tl.dot(tl.trans(grad_scores), k)
    tl.store(grad_qkv + at, grad_q.to(grad_qkv.dtype.element_ty), mask=exists)


def _launch(function: _dispatch.Kernel, qkv: Tensor, *tensors: Tensor) -> None:
    """A program for each head of each sample."""
    batch, tokens, _, heads, head = qkv.shape
    _dispatch.launch(
        function,
        (batch * heads,),
        qkv,
        *tensors,
        head**-0.5,
        tokens,
        heads,
        head,
        # A matrix product has sides of at least 16.
        BLOCK=max(16, _dispatch.next_power_of_2(tokens)),
        BLOCK_HEAD=max(16, _dispatch.next_power_of_2(head)),
    )


def _runs(qkv: Tensor) -> bool:
    """Whether the kernels do: exact products of float32 are more than a program's registers hold."""
    return qkv.dtype.itemsize == 2 and _dispatch.use_triton(qkv)


def _forward_triton(qkv: Tensor) -> Tensor:
    qkv = qkv.contiguous()
    out = qkv.new_empty(_out_shape(qkv))
    _launch(_short_attention_forward_kernel, qkv, out)
    return out


def _backward_triton(grad: Tensor, qkv: Tensor) -> Tensor:
    qkv = qkv.contiguous()
    grad_qkv = qkv.new_empty(qkv.shape)
    _launch(_short_attention_backward_kernel, qkv, grad.contiguous(), grad_qkv)
    return grad_qkv


def _forward_torch(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def _backward_torch(grad: Tensor, qkv: Tensor) -> Tensor:
    compute = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(compute).permute(2, 0, 3, 1, 4)
    upstream, scale = grad.to(compute).transpose(1, 2), qkv.shape[-1] ** -0.5
    weights = ((q * scale) @ k.transpose(2, 3)).softmax(-1)
    scores = torch._softmax_backward_data(upstream @ v.transpose(2, 3), weights, -1, compute) * scale
    grads = scores @ k, scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ upstream
    return torch.stack([x.transpose(1, 2) for x in grads], 2).to(qkv.dtype)


def _out_shape(qkv: Tensor) -> tuple[int, ...]:
    batch, tokens, _, heads, head = qkv.shape
    return batch, tokens, heads, head


@operation("short_attention")
def _short_attention(qkv: Tensor) -> Tensor:
    return (_forward_triton if _runs(qkv) else _forward_torch)(qkv)


@_short_attention.register_fake
def _(qkv: Tensor) -> Tensor:
    return qkv.new_empty(_out_shape(qkv))


@operation("short_attention_backward")
def _short_attention_backward(grad: Tensor, qkv: Tensor) -> Tensor:
    return (_backward_triton if _runs(qkv) else _backward_torch)(grad, qkv)


@_short_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> Tensor:
    return _short_attention_backward(grad, *ctx.saved_tensors)


_short_attention.register_autograd(_backward, setup_context=_setup_context)


def short_attention(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v of every head, for samples of few tokens.

    In 16 bits a program reads a head's queries, keys and values once and holds all scores in registers: nothing but
    `qkv` is kept, and its gradient is one tensor too, so that nothing is put together.
    Scores and their softmax are float32; what multiplies the values is rounded to the dtype of `qkv`, as in
    FlashAttention. Kernels for long sequences fill tiles of 64 or 128 tokens and read the result again. In float32 and
    float64 it is plain PyTorch.

    Args:
        qkv: [B, N, 3, H, d] float, as one linear makes queries, keys and values; N and d are at most 64. A tensor that
            is not contiguous is copied.

    Returns:
        [B, N, H, d], in its dtype.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: another shape; more tokens or a wider head; nothing to attend to.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1.
    """
    _dispatch.check_tensor("qkv", qkv, "[B, N, 3, H, d]", _dispatch.FLOAT_DTYPES)
    _dispatch.check_shape("qkv", qkv, "[B, N, 3, H, d]", (None, None, 3, None, None))
    if qkv.numel() == 0:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; wanted at least one number")
    if qkv.shape[1] > MAX_TOKENS or qkv.shape[4] > MAX_HEAD:
        raise ValueError(
            f"qkv has shape {list(qkv.shape)}; wanted at most {MAX_TOKENS} tokens and heads of at most {MAX_HEAD}"
        )
    return _short_attention(qkv)
