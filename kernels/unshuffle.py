"""Assemble the decoder's input: kept tokens back in place, mask tokens elsewhere, positions added."""

import torch
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation
from .gather_tokens import row_index, token_order
from .tiles import GROUP_SAMPLES, PROGRAM_ROWS, TILE_ELEMENTS, WARPS, sample_tile, tile_grid


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
    batch,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # Positions and the mask token stay in registers while the samples of a group pass by.
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    token_valid, column_valid = token < tokens, column < columns
    masked = tl.load(mask_token + column * stride_mask_column, mask=column_valid, other=0.0)
    position = tl.load(
        pos_embed + token[:, None] * stride_pos_row + column[None, :] * stride_pos_column,
        mask=token_valid[:, None] & column_valid[None, :],
        other=0.0,
    )
    for start in range(0, GROUP, BLOCK_SAMPLES):
        sample = (tl.program_id(2) * GROUP + start + tl.arange(0, BLOCK_SAMPLES)).to(tl.int64)
        row_valid = token_valid[:, None] & (sample < batch)[None, :]
        # Token 0 is the cls token: it reads no id, and -1 + 1 sends it to row 0 of `latent`.
        ids_at = sample[None, :] * stride_ids_batch + (token - 1)[:, None] * stride_ids_column
        ids_valid = row_valid & (token > 0)[:, None]
        source = tl.load(ids_restore + ids_at, mask=ids_valid, other=-1).to(tl.int64) + 1
        is_kept = source <= kept
        latent_at = sample[None, :] * stride_latent_batch + source * stride_latent_row
        values = tl.load(
            latent + latent_at[:, :, None] + column[None, None, :] * stride_latent_column,
            mask=(row_valid & is_kept)[:, :, None] & column_valid[None, None, :],
            other=0.0,
        ).to(tl.float32)
        values = tl.where(is_kept[:, :, None], values, masked.to(tl.float32)[None, None, :])
        values += position.to(tl.float32)[:, None, :]
        out_at = (sample[None, :] * tokens + token[:, None]) * columns
        tl.store(
            out + out_at[:, :, None] + column[None, None, :],
            values.to(out.dtype.element_ty),
            mask=row_valid[:, :, None] & column_valid[None, None, :],
        )


@kernel
def _unshuffle_backward_kernel(
    grad,
    ids_restore,
    grad_latent,
    partial_mask,
    partial_pos,
    stride_grad_batch,
    stride_grad_row,
    stride_grad_column,
    stride_ids_batch,
    stride_ids_column,
    kept,
    columns,
    tokens,
    batch,
    SUM_POSITIONS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # The gradient is read once, in the order of the output. A kept row has one destination, so it is stored
    # there without a search or atomics; a removed row is added to this program's share of the mask token's.
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    column_valid = column < columns
    mask_total = tl.full([BLOCK_TOKENS, BLOCK_SAMPLES, BLOCK_COLUMNS], 0, tl.float32)
    for first in range(0, SPAN, BLOCK_TOKENS):
        token = (tl.program_id(0) * SPAN + first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        token_valid = token < tokens
        pos_total = tl.full([BLOCK_TOKENS, BLOCK_SAMPLES, BLOCK_COLUMNS], 0, tl.float32)
        for start in range(0, GROUP, BLOCK_SAMPLES):
            sample = (tl.program_id(2) * GROUP + start + tl.arange(0, BLOCK_SAMPLES)).to(tl.int64)
            row_valid = token_valid[:, None] & (sample < batch)[None, :]
            valid = row_valid[:, :, None] & column_valid[None, None, :]
            grad_at = sample[None, :] * stride_grad_batch + token[:, None] * stride_grad_row
            values = tl.load(
                grad + grad_at[:, :, None] + column[None, None, :] * stride_grad_column, mask=valid, other=0.0
            ).to(tl.float32)
            ids_at = sample[None, :] * stride_ids_batch + (token - 1)[:, None] * stride_ids_column
            ids_valid = row_valid & (token > 0)[:, None]
            target = tl.load(ids_restore + ids_at, mask=ids_valid, other=-1).to(tl.int64) + 1
            is_kept = (target <= kept)[:, :, None]
            mask_total += tl.where(is_kept, 0.0, values)
            if SUM_POSITIONS:
                pos_total += values
            latent_at = (sample[None, :] * (kept + 1) + target) * columns
            tl.store(
                grad_latent + latent_at[:, :, None] + column[None, None, :],
                values.to(grad_latent.dtype.element_ty),
                mask=valid & is_kept,
            )
        if SUM_POSITIONS:
            pos_at = (tl.program_id(2) * tokens + token)[:, None] * columns + column[None, :]
            tl.store(
                partial_pos + pos_at,
                tl.sum(pos_total, axis=1).to(partial_pos.dtype.element_ty),
                mask=token_valid[:, None] & column_valid[None, :],
            )
    program = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    mask_sum = tl.sum(tl.sum(mask_total, axis=1), axis=0)
    tl.store(partial_mask + program * columns + column, mask_sum, mask=column_valid)


def _forward_triton(
    latent: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, dtype: torch.dtype
) -> Tensor:
    for name, tensor in (("latent", latent), ("mask_token", mask_token), ("pos_embed", pos_embed)):
        _dispatch.check_kernel_dtype(name, tensor)
    batch, tokens, columns = latent.shape[0], pos_embed.shape[1], latent.shape[2]
    out = latent.new_empty(batch, tokens, columns, dtype=dtype)
    tile = sample_tile(batch, columns)
    group = min(GROUP_SAMPLES, _dispatch.next_power_of_2(batch))
    _dispatch.launch(
        _unshuffle_forward_kernel,
        (*tile_grid(tile, tokens, columns), _dispatch.cdiv(batch, group)),
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
        batch,
        num_warps=WARPS,
        GROUP=group,
        **tile,
    )
    return out


def _backward_triton(
    grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype, pos_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, columns = grad.shape
    grad_latent = grad.new_empty(batch, kept + 1, columns, dtype=dtype)
    # Two sums instead of one: half a tile keeps them in registers.
    tile = sample_tile(batch, columns, TILE_ELEMENTS // 2 if pos_dtype else TILE_ELEMENTS)
    group = min(PROGRAM_ROWS, _dispatch.next_power_of_2(batch))
    span = max(PROGRAM_ROWS // group, tile["BLOCK_TOKENS"])
    spans, groups = _dispatch.cdiv(tokens, span), _dispatch.cdiv(batch, group)
    partial_mask = grad.new_empty(spans * groups, columns, dtype=torch.float32)
    # The sums of a single group are whole: they are written in the dtype that is wanted.
    partial_pos = grad.new_empty(
        (groups, tokens, columns) if pos_dtype else 0, dtype=pos_dtype if groups == 1 else torch.float32
    )
    _dispatch.launch(
        _unshuffle_backward_kernel,
        (spans, _dispatch.cdiv(columns, tile["BLOCK_COLUMNS"]), groups),
        grad,
        ids_restore,
        grad_latent,
        partial_mask,
        partial_pos,
        *grad.stride(),
        *ids_restore.stride(),
        kept,
        columns,
        tokens,
        batch,
        num_warps=WARPS,
        SUM_POSITIONS=pos_dtype is not None,
        SPAN=span,
        GROUP=group,
        **tile,
    )
    if pos_dtype and groups > 1:
        partial_pos = partial_pos.sum(0, keepdim=True).to(pos_dtype)
    return grad_latent, partial_mask.sum(0), partial_pos


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
    grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype, pos_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, columns = grad.shape
    accumulator = torch.promote_types(grad.dtype, torch.float32)
    order = token_order(ids_restore)
    rows = grad.reshape(batch * tokens, columns)
    grad_latent = rows.index_select(0, row_index(order[:, : kept + 1], tokens))
    removed = rows.index_select(0, row_index(order[:, kept + 1 :], tokens))
    grad_pos = grad.new_empty(0, dtype=pos_dtype)
    if pos_dtype:
        grad_pos = grad.sum(0, keepdim=True, dtype=accumulator).to(pos_dtype)
    return grad_latent.view(batch, kept + 1, columns).to(dtype), removed.sum(0, dtype=accumulator), grad_pos


@operation("unshuffle")
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


@operation("unshuffle_backward")
def _unshuffle_backward(
    grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype, pos_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _backward_triton if _dispatch.use_triton(grad) else _backward_torch
    return backward(grad, ids_restore, kept, dtype, pos_dtype)


@_unshuffle_backward.register_fake
def _(
    grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype, pos_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, columns = grad.shape
    grad_latent = grad.new_empty(batch, kept + 1, columns, dtype=dtype)
    grad_mask = grad.new_empty(columns, dtype=torch.promote_types(grad.dtype, torch.float32))
    return grad_latent, grad_mask, grad.new_empty((1, tokens, columns) if pos_dtype else 0, dtype=pos_dtype)


def _setup_context(ctx, inputs, output) -> None:
    latent, mask_token, pos_embed, ids_restore = inputs
    ctx.save_for_backward(ids_restore)
    ctx.kept = latent.shape[1] - 1
    ctx.dtypes = latent.dtype, mask_token.dtype, pos_embed.dtype


def _backward(ctx, grad: Tensor):
    (ids_restore,) = ctx.saved_tensors
    latent_dtype, mask_dtype, pos_dtype = ctx.dtypes
    grad_latent, grad_mask, grad_pos = _unshuffle_backward(
        grad, ids_restore, ctx.kept, latent_dtype, pos_dtype if ctx.needs_input_grad[2] else None
    )
    grad_pos = grad_pos if ctx.needs_input_grad[2] else None
    return grad_latent, grad_mask.to(mask_dtype)[None, None], grad_pos, None


_unshuffle.register_autograd(_backward, setup_context=_setup_context)


def unshuffle(latent: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    """Put kept tokens back in place, mask tokens at removed positions, and add the position embedding.

    Position n takes kept row ids_restore[n] if that is below K, else the mask token. The sum is formed in
    float32 and rounded once; the gradients of the mask token and the positions are summed in float32, over a group of
    samples and then over groups, deterministically.

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
