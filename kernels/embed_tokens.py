"""Assemble the encoder's input: positions added to the visible patches, the cls token in front."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from .gather_tokens import scatter_tokens


def embed_tokens_reference(x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_keep: Tensor) -> Tensor:
    """MAE's encoder input. x [B, K, D], cls_token [1, 1, D], pos_embed [1, 1+N, D] -> [B, 1+K, D]."""
    batch, _, width = x.shape
    table = pos_embed[:, 1:].expand(batch, -1, -1)
    positions = table.gather(1, ids_keep.long()[..., None].expand(-1, -1, width))
    cls = (cls_token + pos_embed[:, :1]).expand(batch, -1, -1)
    return torch.cat([cls, x + positions], dim=1)


@kernel
def _embed_tokens_forward_kernel(
    x,
    cls_token,
    pos_embed,
    ids_keep,
    out,
    stride_x_batch,
    stride_x_row,
    stride_x_column,
    stride_cls_column,
    stride_pos_row,
    stride_pos_column,
    stride_ids_batch,
    stride_ids_column,
    tokens,
    columns,
    rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    batch = (row // tokens).to(tl.int64)
    token = (row % tokens).to(tl.int64)
    row_valid = row < rows
    is_patch = (token > 0)[:, None]
    valid = row_valid[:, None] & (column < columns)[None, :]
    # Token 0 is the cls token: it reads no id, and -1 + 1 sends it to row 0 of the table.
    ids_at = batch * stride_ids_batch + (token - 1) * stride_ids_column
    place = tl.load(ids_keep + ids_at, mask=row_valid & (token > 0), other=-1).to(tl.int64) + 1
    x_at = batch * stride_x_batch + (token - 1) * stride_x_row
    values = tl.load(
        x + x_at[:, None] + column[None, :] * stride_x_column, mask=valid & is_patch, other=0.0
    ).to(tl.float32)
    cls = tl.load(
        cls_token + column[None, :] * stride_cls_column, mask=(column < columns)[None, :], other=0.0
    )
    position = tl.load(
        pos_embed + place[:, None] * stride_pos_row + column[None, :] * stride_pos_column,
        mask=valid,
        other=0.0,
    )
    values = tl.where(is_patch, values, cls.to(tl.float32)) + position.to(tl.float32)
    out_at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + out_at, values.to(out.dtype.element_ty), mask=valid)


def _forward_triton(
    x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_keep: Tensor, dtype: torch.dtype
) -> Tensor:
    for name, tensor in (("x", x), ("cls_token", cls_token), ("pos_embed", pos_embed)):
        _dispatch.check_kernel_dtype(name, tensor)
    batch, kept, columns = x.shape
    out = x.new_empty(batch, 1 + kept, columns, dtype=dtype)
    block_columns = _dispatch.column_block(columns)
    block_rows = 2048 // block_columns
    rows = batch * (1 + kept)
    _dispatch.launch(
        _embed_tokens_forward_kernel,
        (triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)),
        x,
        cls_token,
        pos_embed,
        ids_keep,
        out,
        *x.stride(),
        cls_token.stride(2),
        *pos_embed.stride()[1:],
        *ids_keep.stride(),
        1 + kept,
        columns,
        rows,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    return out


def _forward_torch(
    x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_keep: Tensor, dtype: torch.dtype
) -> Tensor:
    batch, kept, columns = x.shape
    out = x.new_empty(batch, 1 + kept, columns, dtype=dtype)
    positions = pos_embed[0].index_select(0, (ids_keep + 1).flatten())
    torch.add(x, positions.view(batch, kept, columns), out=out[:, 1:])
    out[:, 0] = cls_token[0] + pos_embed[0, :1]
    return out


def _result_dtype(x: Tensor, cls_token: Tensor, pos_embed: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, cls_token.dtype), pos_embed.dtype)


@torch.library.custom_op("fastmim::embed_tokens", mutates_args=())
def _embed_tokens(x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_keep: Tensor) -> Tensor:
    _dispatch.check_range("ids_keep", ids_keep, 0, pos_embed.shape[1] - 1)
    forward = _forward_triton if _dispatch.use_triton(x) else _forward_torch
    return forward(x, cls_token, pos_embed, ids_keep, _result_dtype(x, cls_token, pos_embed))


@_embed_tokens.register_fake
def _(x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_keep: Tensor) -> Tensor:
    shape = x.shape[0], 1 + x.shape[1], x.shape[2]
    return x.new_empty(shape, dtype=_result_dtype(x, cls_token, pos_embed))


def _setup_context(ctx, inputs, output) -> None:
    x, cls_token, pos_embed, ids_keep = inputs
    ctx.save_for_backward(ids_keep)
    ctx.tokens = pos_embed.shape[1]
    ctx.dtypes = x.dtype, cls_token.dtype, pos_embed.dtype


def _backward(ctx, grad: Tensor):
    (ids_keep,) = ctx.saved_tensors
    x_dtype, cls_dtype, pos_dtype = ctx.dtypes
    accumulator = torch.promote_types(grad.dtype, torch.float32)
    grad_cls = grad_pos = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        total = grad[:, :1].sum(0, keepdim=True, dtype=accumulator)
        grad_cls = total.to(cls_dtype)
    if ctx.needs_input_grad[2]:
        grad_patches = scatter_tokens(grad[:, 1:], ids_keep, ctx.tokens - 1)
        grad_patches = grad_patches.sum(0, keepdim=True, dtype=accumulator)
        grad_pos = torch.cat([total, grad_patches], dim=1).to(pos_dtype)
    return grad[:, 1:].to(x_dtype), grad_cls, grad_pos, None


_embed_tokens.register_autograd(_backward, setup_context=_setup_context)


def embed_tokens(x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_keep: Tensor) -> Tensor:
    """Add to each visible patch its position, and put the cls token, with its own, in front.

    Each sum is formed in float32 and rounded once. The gradient of `x` is rows 1.. of the incoming gradient: a
    view, where the dtypes agree. The gradient of `cls_token` sums row 0 over the batch in float32. A gradient for
    `pos_embed`, computed only where required, is a `scatter_tokens` summed over the batch. All are deterministic.

    Args:
        x: [B, K, D] float, any strides.
        cls_token: [1, 1, D] float.
        pos_embed: [1, 1+N, D] float, row 0 for the cls token.
        ids_keep: [B, K] int64 or int32, any strides, unique within a sample, below N.

    Returns:
        [B, 1+K, D] in the dtype that PyTorch promotes the three float inputs to: row 0 is
        `cls_token + pos_embed[0]`, row 1 + k is `x[b, k] + pos_embed[1 + ids_keep[b, k]]`.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes, batches or devices that do not fit; no ids; ids out of range (see `_dispatch`).

    Source: MAE's encoder input (He et al., CVPR 2022, section 3).
    """
    _dispatch.check_tensor("x", x, "[B, K, D]", _dispatch.FLOAT_DTYPES)
    _dispatch.check_ids("ids_keep", ids_keep, x, "x", "K")
    columns = x.shape[2]
    _dispatch.check_shape("x", x, "[B, K, D]", (None, ids_keep.shape[1], None))
    _dispatch.check_tensor("cls_token", cls_token, "[1, 1, D]", _dispatch.FLOAT_DTYPES, x.device)
    _dispatch.check_shape("cls_token", cls_token, "[1, 1, D]", (1, 1, columns))
    _dispatch.check_tensor("pos_embed", pos_embed, "[1, 1+N, D]", _dispatch.FLOAT_DTYPES, x.device)
    _dispatch.check_shape("pos_embed", pos_embed, "[1, 1+N, D]", (1, None, columns))
    if pos_embed.shape[1] <= ids_keep.shape[1]:
        raise ValueError(
            f"pos_embed has {pos_embed.shape[1]} rows; wanted at least {1 + ids_keep.shape[1]}: cls and K patches"
        )
    return _embed_tokens(x, cls_token, pos_embed, ids_keep)
