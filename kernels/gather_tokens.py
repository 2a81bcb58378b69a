"""Select tokens by index, and its adjoint, which puts them back and writes each row once."""

import torch
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation


def gather_tokens_reference(x: Tensor, ids: Tensor, offset: int = 0) -> Tensor:
    """Select tokens. x [B, N, D], ids [B, K] -> x[b, ids[b, k] + offset] [B, K, D]."""
    return x.gather(1, (ids.long() + offset)[..., None].expand(-1, -1, x.shape[-1]))


def scatter_tokens_reference(x: Tensor, ids: Tensor, tokens: int, offset: int = 0) -> Tensor:
    """Place tokens. x [B, K, D], ids [B, K] -> [B, tokens, D], x[b, k] at row ids[b, k] + offset, else 0."""
    index = (ids.long() + offset)[..., None].expand_as(x)
    return x.new_zeros(x.shape[0], tokens, x.shape[2]).scatter(1, index, x)


@kernel
def _gather_tokens_forward_kernel(
    x,
    ids,
    out,
    stride_x_batch,
    stride_x_row,
    stride_x_column,
    stride_ids_batch,
    stride_ids_column,
    offset,
    kept,
    columns,
    rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_valid = row < rows
    valid = row_valid[:, None] & (column < columns)[None, :]
    batch = (row // kept).to(tl.int64)
    ids_at = batch * stride_ids_batch + (row % kept).to(tl.int64) * stride_ids_column
    source = tl.load(ids + ids_at, mask=row_valid, other=0).to(tl.int64) + offset
    source_at = batch * stride_x_batch + source * stride_x_row
    values = tl.load(x + source_at[:, None] + column.to(tl.int64)[None, :] * stride_x_column, mask=valid)
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], values, mask=valid)


@kernel
def _scatter_tokens_forward_kernel(
    x,
    ids,
    out,
    stride_x_batch,
    stride_x_row,
    stride_x_column,
    stride_ids_batch,
    stride_ids_column,
    offset,
    kept,
    columns,
    tokens,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    blocks = (tokens + BLOCK_ROWS - 1) // BLOCK_ROWS
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token_valid = token < tokens
    # A row looks itself up among the sample's ids: cheaper than a memset and a scatter, which write the
    # selected rows twice. 0 means not selected, otherwise 1 + the row of `x`.
    found = tl.full([BLOCK_ROWS], 0, tl.int32)
    for start in range(0, kept, BLOCK_IDS):
        index = start + tl.arange(0, BLOCK_IDS)
        ids_at = batch * stride_ids_batch + index.to(tl.int64) * stride_ids_column
        chosen = tl.load(ids + ids_at, mask=index < kept, other=-1).to(tl.int32)
        hit = (chosen[None, :] + offset == token[:, None]) & (index < kept)[None, :]
        found = tl.maximum(found, tl.max(tl.where(hit, index[None, :] + 1, 0), axis=1))
    selected = (found > 0) & token_valid
    source_at = batch * stride_x_batch + (found - 1).to(tl.int64) * stride_x_row
    target_at = (batch * tokens + token) * columns
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        valid = (column < columns)[None, :]
        values = tl.load(
            x + source_at[:, None] + column.to(tl.int64)[None, :] * stride_x_column,
            mask=valid & selected[:, None],
            other=0.0,
        )
        tl.store(out + target_at[:, None] + column[None, :], values, mask=valid & token_valid[:, None])


def _gather_triton(x: Tensor, ids: Tensor, offset: int) -> Tensor:
    (batch, kept), columns = ids.shape, x.shape[-1]
    _dispatch.check_kernel_dtype("x", x)
    out = x.new_empty(batch, kept, columns)
    block_columns = _dispatch.column_block(columns)
    block_rows = 2048 // block_columns
    grid = (_dispatch.cdiv(batch * kept, block_rows), _dispatch.cdiv(columns, block_columns))
    _dispatch.launch(
        _gather_tokens_forward_kernel,
        grid,
        x,
        ids,
        out,
        *x.stride(),
        *ids.stride(),
        offset,
        kept,
        columns,
        batch * kept,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    return out


def _scatter_triton(x: Tensor, ids: Tensor, tokens: int, offset: int) -> Tensor:
    batch, kept, columns = x.shape
    _dispatch.check_kernel_dtype("x", x)
    out = x.new_empty(batch, tokens, columns)
    block_columns = _dispatch.column_block(columns)
    block_rows = min(16, 2048 // block_columns)
    _dispatch.launch(
        _scatter_tokens_forward_kernel,
        (batch * _dispatch.cdiv(tokens, block_rows),),
        x,
        ids,
        out,
        *x.stride(),
        *ids.stride(),
        offset,
        kept,
        columns,
        tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        BLOCK_IDS=64,
    )
    return out


def _as_table(x: Tensor) -> tuple[Tensor, int]:
    """View x [B, N, D] as rows [R, D] with a fixed step from sample to sample.

    `index_select` on rows is a copy per row, 10 times as fast as `gather`. A slice such as `x[:, 1:]` and an
    expanded batch (step 0) are views here; only layouts whose samples do not start on a row are copied.
    """
    per_sample, per_row, per_column = x.stride()
    if per_row == 0 or per_sample % per_row != 0:
        x = x.contiguous()
        per_sample, per_row, per_column = x.stride()
    step = per_sample // per_row
    rows = (x.shape[0] - 1) * step + x.shape[1]
    return x.as_strided((rows, x.shape[2]), (per_row, per_column)), step


def row_index(ids: Tensor, step: int, offset: int = 0) -> Tensor:
    """Turn ids [B, K] within samples into rows [B * K] of a table with `step` rows a sample."""
    first = torch.arange(ids.shape[0], device=ids.device)[:, None] * step + offset
    return (ids + first).flatten()


def token_order(ids_restore: Tensor) -> Tensor:
    """Invert the order of the tokens. ids_restore [B, N] -> int64 [B, 1+N]: 0 for the cls token, then kept, removed."""
    batch, patches = ids_restore.shape
    token = torch.arange(1, 1 + patches, device=ids_restore.device).expand(batch, -1)
    order = ids_restore.new_zeros(batch, 1 + patches, dtype=torch.int64)
    order[:, 1:].scatter_(1, ids_restore.long(), token)
    return order


def _gather_torch(x: Tensor, ids: Tensor, offset: int) -> Tensor:
    table, step = _as_table(x)
    return table.index_select(0, row_index(ids, step, offset)).view(*ids.shape, x.shape[2])


def _scatter_torch(x: Tensor, ids: Tensor, tokens: int, offset: int) -> Tensor:
    batch, _, columns = x.shape
    out = x.new_zeros(batch * tokens, columns)
    out.index_copy_(0, row_index(ids, tokens, offset), x.flatten(0, 1))
    return out.view(batch, tokens, columns)


@operation("gather_tokens")
def _gather_tokens(x: Tensor, ids: Tensor, offset: int) -> Tensor:
    _dispatch.check_range("ids", ids, -offset, x.shape[1] - offset)
    return (_gather_triton if _dispatch.use_triton(x) else _gather_torch)(x, ids, offset)


@_gather_tokens.register_fake
def _(x: Tensor, ids: Tensor, offset: int) -> Tensor:
    return x.new_empty(*ids.shape, x.shape[2])


@operation("scatter_tokens")
def _scatter_tokens(x: Tensor, ids: Tensor, tokens: int, offset: int) -> Tensor:
    _dispatch.check_range("ids", ids, -offset, tokens - offset)
    return (_scatter_triton if _dispatch.use_triton(x) else _scatter_torch)(x, ids, tokens, offset)


@_scatter_tokens.register_fake
def _(x: Tensor, ids: Tensor, tokens: int, offset: int) -> Tensor:
    return x.new_empty(x.shape[0], tokens, x.shape[2])


def _setup_gather(ctx, inputs, output) -> None:
    x, ids, offset = inputs
    ctx.save_for_backward(ids)
    ctx.tokens, ctx.offset = x.shape[1], offset


def _gather_backward(ctx, grad: Tensor):
    (ids,) = ctx.saved_tensors
    return _scatter_tokens(grad, ids, ctx.tokens, ctx.offset), None, None


def _setup_scatter(ctx, inputs, output) -> None:
    _, ids, _, offset = inputs
    ctx.save_for_backward(ids)
    ctx.offset = offset


def _scatter_backward(ctx, grad: Tensor):
    (ids,) = ctx.saved_tensors
    return _gather_tokens(grad, ids, ctx.offset), None, None, None


_gather_tokens.register_autograd(_gather_backward, setup_context=_setup_gather)
_scatter_tokens.register_autograd(_scatter_backward, setup_context=_setup_scatter)


def gather_tokens(x: Tensor, ids: Tensor, offset: int = 0) -> Tensor:
    """Select tokens of each sample; the gradient is written once per row of `x`, without atomics.

    Args:
        x: [B, N, D] float, any strides; a batch of stride 0 (an expanded position table) is read as it is.
        ids: [B, K] int64 or int32, any strides, unique within a sample; the gradient of a
            repeated id is wrong.
        offset: rows of `x` to skip; ids count from row `offset` (1 after a cls token).

    Returns:
        x[b, ids[b, k] + offset], [B, K, D] in the dtype of `x`.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes, batches or devices that do not fit; no ids; ids out of range (see `_dispatch`).

    Source: the visible-token selection of MAE (He et al., CVPR 2022, section 3).
    """
    _dispatch.check_tensor("x", x, "[B, N, D]", _dispatch.FLOAT_DTYPES)
    _dispatch.check_ids("ids", ids, x, "x", "K")
    if not 0 <= offset < x.shape[1]:
        raise ValueError(f"offset is {offset}; wanted 0..{x.shape[1] - 1}, a row of x")
    return _gather_tokens(x, ids, offset)


def scatter_tokens(x: Tensor, ids: Tensor, tokens: int, offset: int = 0) -> Tensor:
    """Place the tokens of each sample among zeros: the adjoint of `gather_tokens`, without atomics.

    Args:
        x: [B, K, D] float, any strides.
        ids: [B, K] int64 or int32, any strides, unique within a sample; which of two tokens with one id
            stays is undefined.
        tokens: rows of the result.
        offset: rows of the result to skip; ids count from row `offset` (1 after a cls token).

    Returns:
        [B, tokens, D] in the dtype of `x`: x[b, k] in row ids[b, k] + offset, zeros elsewhere.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes, batches or devices that do not fit; no ids; ids out of range (see `_dispatch`).
    """
    _dispatch.check_tensor("x", x, "[B, K, D]", _dispatch.FLOAT_DTYPES)
    _dispatch.check_ids("ids", ids, x, "x", "K")
    _dispatch.check_shape("x", x, "[B, K, D]", (None, ids.shape[1], None))
    if tokens < ids.shape[1]:
        raise ValueError(f"tokens is {tokens}; wanted at least {ids.shape[1]}, one row per id")
    if not 0 <= offset < tokens:
        raise ValueError(f"offset is {offset}; wanted 0..{tokens - 1}, a row of the result")
    return _scatter_tokens(x, ids, tokens, offset)
