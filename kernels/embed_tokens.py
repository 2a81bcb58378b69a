"""Assemble the encoder's input: positions added to the visible patches, the cls token in front."""

import torch
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation
from .gather_tokens import scatter_tokens, token_order
from .tiles import GROUP_SAMPLES, WARPS, sample_tile, tile_grid


def embed_tokens_reference(x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    """MAE's encoder input. x [B, K, D], cls_token [1, 1, D], pos_embed [1, 1+N, D] -> [B, 1+K, D]."""
    batch, kept, width = x.shape
    ids_keep = ids_restore.argsort(dim=1)[:, :kept]
    table = pos_embed[:, 1:].expand(batch, -1, -1)
    positions = table.gather(1, ids_keep[..., None].expand(-1, -1, width))
    cls = (cls_token + pos_embed[:, :1]).expand(batch, -1, -1)
    return torch.cat([cls, x + positions], dim=1)


@kernel
def _embed_tokens_forward_kernel(
    x,
    cls_token,
    pos_embed,
    ids_restore,
    out,
    stride_x_batch,
    stride_x_row,
    stride_x_column,
    stride_cls_column,
    stride_pos_row,
    stride_pos_column,
    stride_ids_batch,
    stride_ids_column,
    kept,
    columns,
    tokens,
    batch,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # A program owns positions, reads each once for a group of samples, and writes the rows of those that keep it.
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    column_valid = column < columns
    is_patch = token > 0
    # Only the first program has the cls token.
    cls = tl.load(
        cls_token + column * stride_cls_column, mask=column_valid & (tl.program_id(0) == 0), other=0.0
    ).to(tl.float32)
    for start in range(0, GROUP, BLOCK_SAMPLES):
        sample = (tl.program_id(2) * GROUP + start + tl.arange(0, BLOCK_SAMPLES)).to(tl.int64)
        row_valid = (token < tokens)[:, None] & (sample < batch)[None, :]
        # Token 0 reads no id, and -1 + 1 sends it to row 0 of `out`.
        ids_at = sample[None, :] * stride_ids_batch + (token - 1)[:, None] * stride_ids_column
        place = tl.load(ids_restore + ids_at, mask=row_valid & is_patch[:, None], other=-1).to(tl.int64) + 1
        is_kept = row_valid & (place <= kept)
        is_used = tl.max(is_kept.to(tl.int32), axis=1) > 0
        position = tl.load(
            pos_embed + token[:, None] * stride_pos_row + column[None, :] * stride_pos_column,
            mask=is_used[:, None] & column_valid[None, :],
            other=0.0,
        )
        x_at = sample[None, :] * stride_x_batch + (place - 1) * stride_x_row
        values = tl.load(
            x + x_at[:, :, None] + column[None, None, :] * stride_x_column,
            mask=(is_kept & is_patch[:, None])[:, :, None] & column_valid[None, None, :],
            other=0.0,
        ).to(tl.float32)
        values = tl.where(is_patch[:, None, None], values, cls[None, None, :])
        values += position.to(tl.float32)[:, None, :]
        out_at = (sample[None, :] * (kept + 1) + place) * columns
        tl.store(
            out + out_at[:, :, None] + column[None, None, :],
            values.to(out.dtype.element_ty),
            mask=is_kept[:, :, None] & column_valid[None, None, :],
        )


@kernel
def _embed_tokens_position_kernel(
    grad,
    ids_restore,
    grad_pos,
    stride_grad_batch,
    stride_grad_row,
    stride_grad_column,
    stride_ids_batch,
    stride_ids_column,
    kept,
    columns,
    tokens,
    batch,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    column_valid = column < columns
    total = tl.full([BLOCK_TOKENS, BLOCK_SAMPLES, BLOCK_COLUMNS], 0, tl.float32)
    for start in range(0, batch, BLOCK_SAMPLES):
        sample = (start + tl.arange(0, BLOCK_SAMPLES)).to(tl.int64)
        row_valid = (token < tokens)[:, None] & (sample < batch)[None, :]
        ids_at = sample[None, :] * stride_ids_batch + (token - 1)[:, None] * stride_ids_column
        ids_valid = row_valid & (token > 0)[:, None]
        place = tl.load(ids_restore + ids_at, mask=ids_valid, other=-1).to(tl.int64) + 1
        grad_at = sample[None, :] * stride_grad_batch + place * stride_grad_row
        total += tl.load(
            grad + grad_at[:, :, None] + column[None, None, :] * stride_grad_column,
            mask=(row_valid & (place <= kept))[:, :, None] & column_valid[None, None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(
        grad_pos + token[:, None] * columns + column[None, :],
        tl.sum(total, axis=1).to(grad_pos.dtype.element_ty),
        mask=(token < tokens)[:, None] & column_valid[None, :],
    )


def _forward_triton(
    x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, dtype: torch.dtype
) -> Tensor:
    for name, tensor in (("x", x), ("cls_token", cls_token), ("pos_embed", pos_embed)):
        _dispatch.check_kernel_dtype(name, tensor)
    (batch, kept, columns), tokens = x.shape, pos_embed.shape[1]
    out = x.new_empty(batch, 1 + kept, columns, dtype=dtype)
    tile = sample_tile(batch, columns)
    group = min(GROUP_SAMPLES, _dispatch.next_power_of_2(batch))
    _dispatch.launch(
        _embed_tokens_forward_kernel,
        (*tile_grid(tile, tokens, columns), _dispatch.cdiv(batch, group)),
        x,
        cls_token,
        pos_embed,
        ids_restore,
        out,
        *x.stride(),
        cls_token.stride(2),
        *pos_embed.stride()[1:],
        *ids_restore.stride(),
        kept,
        columns,
        tokens,
        batch,
        num_warps=WARPS,
        GROUP=group,
        **tile,
    )
    return out


def _position_gradient_triton(grad: Tensor, ids_restore: Tensor, dtype: torch.dtype) -> Tensor:
    (batch, rows, columns), tokens = grad.shape, 1 + ids_restore.shape[1]
    grad_pos = grad.new_empty(1, tokens, columns, dtype=dtype)
    tile = sample_tile(batch, columns)
    _dispatch.launch(
        _embed_tokens_position_kernel,
        tile_grid(tile, tokens, columns),
        grad,
        ids_restore,
        grad_pos,
        *grad.stride(),
        *ids_restore.stride(),
        rows - 1,
        columns,
        tokens,
        batch,
        num_warps=WARPS,
        **tile,
    )
    return grad_pos


def _forward_torch(
    x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, dtype: torch.dtype
) -> Tensor:
    batch, kept, columns = x.shape
    visible = token_order(ids_restore)[:, : 1 + kept].flatten()
    out = pos_embed[0].index_select(0, visible).view(batch, 1 + kept, columns).to(dtype)
    out[:, 1:].add_(x)
    out[:, :1].add_(cls_token)
    return out


def _position_gradient_torch(grad: Tensor, ids_restore: Tensor, dtype: torch.dtype) -> Tensor:
    rows = token_order(ids_restore)[:, : grad.shape[1]]
    placed = scatter_tokens(grad, rows, 1 + ids_restore.shape[1])
    return placed.sum(0, keepdim=True, dtype=torch.promote_types(grad.dtype, torch.float32)).to(dtype)


def _result_dtype(x: Tensor, cls_token: Tensor, pos_embed: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, cls_token.dtype), pos_embed.dtype)


@operation("embed_tokens")
def _embed_tokens(x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    _dispatch.check_range("ids_restore", ids_restore, 0, ids_restore.shape[1])
    forward = _forward_triton if _dispatch.use_triton(x) else _forward_torch
    return forward(x, cls_token, pos_embed, ids_restore, _result_dtype(x, cls_token, pos_embed))


@_embed_tokens.register_fake
def _(x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    shape = x.shape[0], 1 + x.shape[1], x.shape[2]
    return x.new_empty(shape, dtype=_result_dtype(x, cls_token, pos_embed))


@operation("embed_tokens_position_gradient")
def _position_gradient(grad: Tensor, ids_restore: Tensor, dtype: torch.dtype) -> Tensor:
    gradient = _position_gradient_triton if _dispatch.use_triton(grad) else _position_gradient_torch
    return gradient(grad, ids_restore, dtype)


@_position_gradient.register_fake
def _(grad: Tensor, ids_restore: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(1, 1 + ids_restore.shape[1], grad.shape[2], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, cls_token, pos_embed, ids_restore = inputs
    ctx.save_for_backward(ids_restore)
    ctx.dtypes = x.dtype, cls_token.dtype, pos_embed.dtype


def _backward(ctx, grad: Tensor):
    (ids_restore,) = ctx.saved_tensors
    x_dtype, cls_dtype, pos_dtype = ctx.dtypes
    grad_cls = grad_pos = None
    if ctx.needs_input_grad[1]:
        # PyTorch sums bfloat16 and float16 in float32 by itself; asked for float32, it would write that as well.
        grad_cls = grad[:, :1].sum(0, keepdim=True).to(cls_dtype)
    if ctx.needs_input_grad[2]:
        grad_pos = _position_gradient(grad, ids_restore, pos_dtype)
    return grad[:, 1:].to(x_dtype), grad_cls, grad_pos, None


_embed_tokens.register_autograd(_backward, setup_context=_setup_context)


def embed_tokens(x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    """Add to each visible patch its position, and put the cls token, with its own, in front.

    Each sum is formed in float32 and rounded once. The gradient of `x` is rows 1.. of the incoming gradient: a
    view, where the dtypes agree. The gradients of `cls_token` and `pos_embed`, computed only where required, are
    summed over the batch in float32. All are deterministic.

    Args:
        x: [B, K, D] float, any strides.
        cls_token: [1, 1, D] float.
        pos_embed: [1, 1+N, D] float, row 0 for the cls token.
        ids_restore: [B, N] int64 or int32, any strides; a permutation of 0..N-1 per sample: patch n is row
            ids_restore[b, n] of `x` if that is below K.

    Returns:
        [B, 1+K, D] in the dtype that PyTorch promotes the three float inputs to: row 0 is
        `cls_token + pos_embed[0]`, row 1 + ids_restore[b, n] is `x[b, ids_restore[b, n]] + pos_embed[1 + n]`.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes, batches or devices that do not fit; no ids; ids out of range (see `_dispatch`).

    Source: MAE's encoder input (He et al., CVPR 2022, section 3).
    """
    _dispatch.check_tensor("x", x, "[B, K, D]", _dispatch.FLOAT_DTYPES)
    _dispatch.check_ids("ids_restore", ids_restore, x, "x", "N")
    patches, columns = ids_restore.shape[1], x.shape[2]
    if not 1 <= x.shape[1] <= patches:
        raise ValueError(f"x has {x.shape[1]} rows; wanted 1..{patches}: the kept ones of N patches")
    _dispatch.check_tensor("cls_token", cls_token, "[1, 1, D]", _dispatch.FLOAT_DTYPES, x.device)
    _dispatch.check_shape("cls_token", cls_token, "[1, 1, D]", (1, 1, columns))
    _dispatch.check_tensor("pos_embed", pos_embed, "[1, 1+N, D]", _dispatch.FLOAT_DTYPES, x.device)
    _dispatch.check_shape("pos_embed", pos_embed, "[1, 1+N, D]", (1, patches + 1, columns))
    return _embed_tokens(x, cls_token, pos_embed, ids_restore)
