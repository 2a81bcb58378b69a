"""Assemble the decoder's input: kept tokens back in place, mask tokens elsewhere, positions added."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from .gather_tokens import row_index


def unshuffle_reference(latent: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    """MAE's decoder input. latent [B, 1+K, D], mask_token [1, 1, D], pos_embed [1, 1+N, D] -> [B, 1+N, D]."""
    batch, kept, width = latent.shape[0], latent.shape[1] - 1, latent.shape[2]
    mask_tokens = mask_token.expand(batch, ids_restore.shape[1] - kept, width)
    shuffled = torch.cat([latent[:, 1:], mask_tokens], dim=1)
    tokens = shuffled.gather(1, ids_restore.long()[..., None].expand(-1, -1, width))
    return torch.cat([latent[:, :1], tokens], dim=1) + pos_embed


@kernel
def _unshuffle_forward_kernel(
    latent,
    mask_token,
    pos_embed,
    ids_restore,
    out,
    stride_latent_batch,
    stride_latent_row,
    stride_latent_column,
    stride_mask_column,
    stride_pos_row,
    stride_pos_column,
    stride_ids_batch,
    stride_ids_column,
    kept,
    columns,
    tokens,
    rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    batch = (row // tokens).to(tl.int64)
    token = (row % tokens).to(tl.int64)
    row_valid = row < rows
    column_valid = (column < columns)[None, :]
    # Token 0 is the cls token: it reads no id, and -1 + 1 sends it to row 0 of `latent`.
    ids_at = batch * stride_ids_batch + (token - 1) * stride_ids_column
    source = tl.load(ids_restore + ids_at, mask=row_valid & (token > 0), other=-1).to(tl.int64) + 1
    is_kept = source <= kept
    latent_at = batch * stride_latent_batch + source * stride_latent_row
    values = tl.load(
        latent + latent_at[:, None] + column[None, :] * stride_latent_column,
        mask=(row_valid & is_kept)[:, None] & column_valid,
        other=0.0,
    ).to(tl.float32)
    masked = tl.load(mask_token + column[None, :] * stride_mask_column, mask=column_valid, other=0.0)
    position = tl.load(
        pos_embed + token[:, None] * stride_pos_row + column[None, :] * stride_pos_column,
        mask=row_valid[:, None] & column_valid,
        other=0.0,
    )
    values = tl.where(is_kept[:, None], values, masked.to(tl.float32)) + position.to(tl.float32)
    out_at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + out_at, values.to(out.dtype.element_ty), mask=row_valid[:, None] & column_valid)


@kernel
def _unshuffle_backward_kernel(
    grad,
    ids_restore,
    grad_latent,
    partial,
    stride_grad_batch,
    stride_grad_row,
    stride_grad_column,
    stride_ids_batch,
    stride_ids_column,
    kept,
    columns,
    tokens,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # The gradient is read once, in the order of the output. A kept row has one destination, so it is stored
    # there without a search or atomics; a removed row is added to this program's share of the mask token's.
    programs = (tokens + PROGRAM_ROWS - 1) // PROGRAM_ROWS
    batch = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs) * PROGRAM_ROWS
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    column_valid = (column < columns)[None, :]
    total = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0, tl.float32)
    for start in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        token = (first + start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_valid = token < tokens
        ids_at = batch * stride_ids_batch + (token - 1) * stride_ids_column
        target = tl.load(ids_restore + ids_at, mask=row_valid & (token > 0), other=-1).to(tl.int64) + 1
        is_kept = (target <= kept)[:, None]
        valid = row_valid[:, None] & column_valid
        grad_at = batch * stride_grad_batch + token * stride_grad_row
        values = tl.load(
            grad + grad_at[:, None] + column[None, :] * stride_grad_column, mask=valid, other=0.0
        ).to(tl.float32)
        total += tl.where(is_kept, 0.0, values)
        latent_at = (batch * (kept + 1) + target) * columns
        tl.store(
            grad_latent + latent_at[:, None] + column[None, :],
            values.to(grad_latent.dtype.element_ty),
            mask=valid & is_kept,
        )
    partial_at = tl.program_id(0).to(tl.int64) * columns + column
    tl.store(partial + partial_at, tl.sum(total, axis=0), mask=column < columns)


def _forward_triton(
    latent: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, dtype: torch.dtype
) -> Tensor:
    for name, tensor in (("latent", latent), ("mask_token", mask_token), ("pos_embed", pos_embed)):
        _dispatch.check_kernel_dtype(name, tensor)
    batch, tokens, columns = latent.shape[0], pos_embed.shape[1], latent.shape[2]
    out = latent.new_empty(batch, tokens, columns, dtype=dtype)
    block_columns = _dispatch.column_block(columns)
    block_rows = 2048 // block_columns
    _dispatch.launch(
        _unshuffle_forward_kernel,
        (triton.cdiv(batch * tokens, block_rows), triton.cdiv(columns, block_columns)),
        latent,
        mask_token,
        pos_embed,
        ids_restore,
        out,
        *latent.stride(),
        mask_token.stride(2),
        *pos_embed.stride()[1:],
        *ids_restore.stride(),
        latent.shape[1] - 1,
        columns,
        tokens,
        batch * tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    return out


def _backward_triton(
    grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, tokens, columns = grad.shape
    grad_latent = grad.new_empty(batch, kept + 1, columns, dtype=dtype)
    # 64 rows a program: the partial sums are about 2 % of the bytes that are read and enough programs run.
    program_rows = 64
    programs = batch * triton.cdiv(tokens, program_rows)
    partial = grad.new_empty(programs, columns, dtype=torch.float32)
    block_columns = _dispatch.column_block(columns)
    _dispatch.launch(
        _unshuffle_backward_kernel,
        (programs, triton.cdiv(columns, block_columns)),
        grad,
        ids_restore,
        grad_latent,
        partial,
        *grad.stride(),
        *ids_restore.stride(),
        kept,
        columns,
        tokens,
        PROGRAM_ROWS=program_rows,
        BLOCK_ROWS=min(program_rows, 2048 // block_columns),
        BLOCK_COLUMNS=block_columns,
    )
    return grad_latent, partial.sum(0)


def _forward_torch(
    latent: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, dtype: torch.dtype
) -> Tensor:
    batch, kept = latent.shape[0], latent.shape[1] - 1
    # One mask token per sample, to which every removed position points, instead of N - K copies.
    table = torch.cat([latent, mask_token.expand(batch, -1, -1)], dim=1)
    source = ids_restore.new_zeros(batch, pos_embed.shape[1], dtype=torch.int64)
    torch.add(ids_restore.clamp(max=kept), 1, out=source[:, 1:])
    rows = table.flatten(0, 1).index_select(0, row_index(source, kept + 2))
    return rows.view(batch, pos_embed.shape[1], -1).to(dtype).add_(pos_embed)


def _backward_torch(
    grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, tokens, columns = grad.shape
    position = torch.arange(1, tokens, device=ids_restore.device).expand(batch, -1)
    ids_shuffle = ids_restore.new_zeros(batch, tokens, dtype=torch.int64)
    ids_shuffle.scatter_(1, ids_restore.long() + 1, position)
    rows = grad.reshape(batch * tokens, columns)
    grad_latent = rows.index_select(0, row_index(ids_shuffle[:, : kept + 1], tokens))
    removed = rows.index_select(0, row_index(ids_shuffle[:, kept + 1 :], tokens))
    total = removed.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    return grad_latent.view(batch, kept + 1, columns).to(dtype), total


@torch.library.custom_op("fastmim::unshuffle", mutates_args=())
def _unshuffle(latent: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    _dispatch.check_range("ids_restore", ids_restore, 0, ids_restore.shape[1])
    forward = _forward_triton if _dispatch.use_triton(latent) else _forward_torch
    dtype = _result_dtype(latent, mask_token, pos_embed)
    return forward(latent, mask_token, pos_embed, ids_restore, dtype)


def _result_dtype(latent: Tensor, mask_token: Tensor, pos_embed: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(latent.dtype, mask_token.dtype), pos_embed.dtype)


@_unshuffle.register_fake
def _(latent: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    shape = latent.shape[0], pos_embed.shape[1], latent.shape[2]
    return latent.new_empty(shape, dtype=_result_dtype(latent, mask_token, pos_embed))


@torch.library.custom_op("fastmim::unshuffle_backward", mutates_args=())
def _unshuffle_backward(
    grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    backward = _backward_triton if _dispatch.use_triton(grad) else _backward_torch
    return backward(grad, ids_restore, kept, dtype)


@_unshuffle_backward.register_fake
def _(grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad_latent = grad.new_empty(grad.shape[0], kept + 1, grad.shape[2], dtype=dtype)
    return grad_latent, grad.new_empty(grad.shape[2], dtype=torch.promote_types(grad.dtype, torch.float32))


def _setup_context(ctx, inputs, output) -> None:
    latent, mask_token, pos_embed, ids_restore = inputs
    ctx.save_for_backward(ids_restore)
    ctx.kept = latent.shape[1] - 1
    ctx.dtypes = latent.dtype, mask_token.dtype, pos_embed.dtype


def _backward(ctx, grad: Tensor):
    (ids_restore,) = ctx.saved_tensors
    latent_dtype, mask_dtype, pos_dtype = ctx.dtypes
    grad_latent, grad_mask = _unshuffle_backward(grad, ids_restore, ctx.kept, latent_dtype)
    grad_pos = None
    if ctx.needs_input_grad[2]:
        accumulator = torch.promote_types(grad.dtype, torch.float32)
        grad_pos = grad.sum(0, keepdim=True, dtype=accumulator).to(pos_dtype)
    return grad_latent, grad_mask.to(mask_dtype)[None, None], grad_pos, None


_unshuffle.register_autograd(_backward, setup_context=_setup_context)


def unshuffle(latent: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    """Put kept tokens back in place, mask tokens at removed positions, and add the position embedding.

    Position n takes kept row ids_restore[n] if that is below K, else the mask token. The sum is formed in
    float32 and rounded once; the mask token's gradient is summed in float32 in two deterministic stages.

    Args:
        latent: [B, 1+K, D] float, any strides; row 0 is the cls token.
        mask_token: [1, 1, D] float.
        pos_embed: [1, 1+N, D] float, row 0 for the cls token; its gradient is computed only where required.
        ids_restore: [B, N] int64 or int32, any strides; a permutation of 0..N-1 per sample.

    Returns:
        [B, 1+N, D] in the dtype that PyTorch promotes the three float inputs to.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes, batches or devices that do not fit; no ids; ids out of range (see `_dispatch`).

    Source: MAE's decoder input (He et al., CVPR 2022, section 3).
    """
    _dispatch.check_tensor("latent", latent, "[B, 1+K, D]", _dispatch.FLOAT_DTYPES)
    _dispatch.check_ids("ids_restore", ids_restore, latent, "latent", "N")
    tokens, columns = ids_restore.shape[1], latent.shape[2]
    if not 2 <= latent.shape[1] <= tokens + 1:
        raise ValueError(
            f"latent has {latent.shape[1]} rows; wanted 2..{tokens + 1}: cls and 1..N kept tokens"
        )
    _dispatch.check_tensor("mask_token", mask_token, "[1, 1, D]", _dispatch.FLOAT_DTYPES, latent.device)
    _dispatch.check_shape("mask_token", mask_token, "[1, 1, D]", (1, 1, columns))
    _dispatch.check_tensor("pos_embed", pos_embed, "[1, 1+N, D]", _dispatch.FLOAT_DTYPES, latent.device)
    _dispatch.check_shape("pos_embed", pos_embed, "[1, 1+N, D]", (1, tokens + 1, columns))
    return _unshuffle(latent, mask_token, pos_embed, ids_restore)
