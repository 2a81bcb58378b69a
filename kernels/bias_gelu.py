"""The bias of an MLP's first linear and the GELU after it."""

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of x + bias. x [R, D] or [B, N, D], bias [D] -> x's shape and dtype."""
    return F.gelu(x + bias.to(x.dtype))


@kernel
def _normal_cdf(values):
    return 0.5 + 0.5 * tl.erf(values * 0.7071067811865476)


@kernel
def _bias_gelu_forward_kernel(
    x,
    bias,
    out,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    valid = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    values = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) + shift[None, :]
    tl.store(out + at, (values * _normal_cdf(values)).to(out.dtype.element_ty), mask=valid)


@kernel
def _bias_gelu_backward_kernel(
    grad,
    x,
    bias,
    grad_x,
    partial,
    rows,
    columns,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first = tl.program_id(0) * PROGRAM_ROWS
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_valid = column < columns
    shift = tl.load(bias + column, mask=column_valid, other=0.0).to(tl.float32)
    total = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0, tl.float32)
    for start in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)
        valid = (row < rows)[:, None] & column_valid[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        values = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) + shift[None, :]
        upstream = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * values * values)
        # Rows past the end have an upstream of 0 and add nothing.
        values = upstream * (_normal_cdf(values) + values * density)
        total += values
        tl.store(grad_x + at, values.to(grad_x.dtype.element_ty), mask=valid)
    partial_at = tl.program_id(0).to(tl.int64) * columns + column
    tl.store(partial + partial_at, tl.sum(total, axis=0), mask=column_valid)


def _forward_triton(x: Tensor, bias: Tensor) -> Tensor:
    for name, tensor in (("x", x), ("bias", bias)):
        _dispatch.check_kernel_dtype(name, tensor)
    out = x.new_empty(x.shape)
    columns = x.shape[-1]
    rows = x.numel() // columns
    block_columns = _dispatch.column_block(columns)
    # 16 rows a program: the bias, which each program reads, is 3 % of its bytes.
    block_rows = 16
    _dispatch.launch(
        _bias_gelu_forward_kernel,
        (_dispatch.cdiv(rows, block_rows), _dispatch.cdiv(columns, block_columns)),
        x.contiguous(),
        bias.contiguous(),
        out,
        rows,
        columns,
        num_warps=_dispatch.warps_for(block_rows * block_columns, 16),
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    return out


def _backward_triton(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    rows = x.numel() // columns
    # 64 rows a program: the float32 partial sums are 2 % of the bytes that it moves in bfloat16.
    program_rows = 64
    programs = _dispatch.cdiv(rows, program_rows)
    grad_x = x.new_empty(x.shape)
    partial = x.new_empty(programs, columns, dtype=torch.float32)
    block_columns = _dispatch.column_block(columns)
    block_rows = min(program_rows, 2048 // block_columns)
    _dispatch.launch(
        _bias_gelu_backward_kernel,
        (programs, _dispatch.cdiv(columns, block_columns)),
        grad.contiguous(),
        x.contiguous(),
        bias.contiguous(),
        grad_x,
        partial,
        rows,
        columns,
        num_warps=_dispatch.warps_for(block_rows * block_columns, 16),
        PROGRAM_ROWS=program_rows,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    return grad_x, partial.sum(0)


def _forward_torch(x: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu_reference(x.contiguous(), bias)


def _backward_torch(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    values = x.contiguous().to(compute) + bias.to(compute)
    grad_x = torch.ops.aten.gelu_backward(grad.contiguous().to(compute), values)
    return grad_x.to(x.dtype), grad_x.flatten(0, -2).sum(0)


@operation("bias_gelu")
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    forward = _forward_triton if _dispatch.use_triton(x) else _forward_torch
    return forward(x, bias)


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operation("bias_gelu_backward")
def _bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    backward = _backward_triton if _dispatch.use_triton(x) else _backward_torch
    return backward(grad, x, bias)


@_bias_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bias_gelu_backward(grad, x, bias)
    return grad_x, grad_bias.to(bias.dtype)


_bias_gelu.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias and apply the exact GELU, z Φ(z) with z = x + bias.

    Computed in float32 and rounded once (in float64 for such an `x`, in plain PyTorch only). The forward pass moves
    what GELU alone does where a matrix product adds the bias. The backward pass forms the bias's gradient from
    registers, in float32 and in two deterministic stages, where PyTorch reads the gradient of x once more.

    Args:
        x: [R, D] or [B, N, D] float: a linear's result without its bias. Strides may be any; a tensor whose rows do
            not follow each other is copied.
        bias: [D] float.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes or devices that do not fit; no rows.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, the form with the error function.
    """
    wanted = "[B, N, D]" if isinstance(x, Tensor) and x.ndim == 3 else "[R, D]"
    _dispatch.check_tensor("x", x, wanted, _dispatch.FLOAT_DTYPES)
    if x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}; wanted at least one row and one column")
    _dispatch.check_tensor("bias", bias, "[D]", _dispatch.FLOAT_DTYPES, x.device)
    _dispatch.check_shape("bias", bias, "[D]", (x.shape[-1],))
    return _bias_gelu(x, bias)
