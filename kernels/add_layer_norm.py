"""The residual addition of a pre-norm transformer block and the LayerNorm after it."""

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation

MAX_COLUMNS = 4096
"""Columns of a row that one program holds in registers, without a spill at any width."""


def add_layer_norm_reference(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """LayerNorm of a sum, and the sum. x, branch [R, D] or [B, N, D], weight, bias [D] -> two of x's shape."""
    total = x + branch
    weight, bias = weight.to(total.dtype), bias.to(total.dtype)
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


@kernel
def centre_rows(values, valid, columns, eps, ROUNDED: tl.constexpr = False):
    """Rows less their mean, 0 outside `valid`, and one over their standard deviation.

    ROUNDED: divide with correct rounding, for a row of equal values to be exactly its mean; it takes registers.
    """
    # Two passes over registers: a variance from a sum of squares would cancel where the mean is large.
    total = tl.sum(values, axis=1)
    average = tl.div_rn(total, columns * 1.0) if ROUNDED else total / columns
    values = tl.where(valid, values - average[:, None], 0.0)
    return values, 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / columns + eps)


@kernel
def _add_layer_norm_forward_kernel(
    x,
    branch,
    weight,
    bias,
    normed,
    total,
    eps,
    rows,
    columns,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * PROGRAM_ROWS
    column = tl.arange(0, BLOCK)
    column_valid = column < columns
    scale = tl.load(weight + column, mask=column_valid, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column_valid, other=0.0).to(tl.float32)
    for start in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)
        valid = (row < rows)[:, None] & column_valid[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        values = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        values += tl.load(branch + at, mask=valid, other=0.0).to(tl.float32)
        # The next addition starts from the rounded sum, so that is what is normalised.
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=valid)
        values, factor = centre_rows(rounded.to(tl.float32), valid, columns, eps, ROUNDED=True)
        values = values * factor[:, None] * scale[None, :] + shift[None, :]
        tl.store(normed + at, values.to(normed.dtype.element_ty), mask=valid)


@kernel
def _add_layer_norm_backward_kernel(
    grad_normed,
    grad_total,
    total,
    weight,
    grad,
    partial,
    eps,
    rows,
    columns,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The sum has to be read in any case, so a row's statistics are recomputed: stored, they would be 8 bytes
    # more to write and to read per row.
    first = tl.program_id(0) * PROGRAM_ROWS
    column = tl.arange(0, BLOCK)
    column_valid = column < columns
    scale = tl.load(weight + column, mask=column_valid, other=0.0).to(tl.float32)
    grad_weight = tl.full([BLOCK_ROWS, BLOCK], 0, tl.float32)
    grad_bias = tl.full([BLOCK_ROWS, BLOCK], 0, tl.float32)
    for start in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)
        valid = (row < rows)[:, None] & column_valid[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        values = tl.load(total + at, mask=valid, other=0.0).to(tl.float32)
        upstream = tl.load(grad_normed + at, mask=valid, other=0.0).to(tl.float32)
        if grad_total is not None:  # loaded before the first reduction waits
            direct = tl.load(grad_total + at, mask=valid, other=0.0)
        centred, factor = centre_rows(values, valid, columns, eps)
        values = centred * factor[:, None]
        grad_weight += upstream * values
        grad_bias += upstream
        upstream = upstream * scale[None, :]
        average = tl.sum(upstream, axis=1) / columns
        along = tl.sum(upstream * values, axis=1) / columns
        values = (upstream - average[:, None] - values * along[:, None]) * factor[:, None]
        if grad_total is not None:
            values += direct.to(tl.float32)
        tl.store(grad + at, values.to(grad.dtype.element_ty), mask=valid)
    partial_at = tl.program_id(0).to(tl.int64) * 2 * columns + column
    tl.store(partial + partial_at, tl.sum(grad_weight, axis=0), mask=column_valid)
    tl.store(partial + partial_at + columns, tl.sum(grad_bias, axis=0), mask=column_valid)


def _launch_settings(columns: int, program_rows: int) -> dict[str, int]:
    """Return warps and constants of either kernel."""
    block = _dispatch.next_power_of_2(columns)
    block_rows = min(program_rows, max(1, 4096 // block))
    return {
        "num_warps": _dispatch.warps_for(block_rows * block, 8),
        "PROGRAM_ROWS": program_rows,
        "BLOCK_ROWS": block_rows,
        "BLOCK": block,
    }


def _forward_triton(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    for name, tensor in (("x", x), ("branch", branch), ("weight", weight), ("bias", bias)):
        _dispatch.check_kernel_dtype(name, tensor)
    dtype = torch.promote_types(x.dtype, branch.dtype)
    normed, total = (x.new_empty(x.shape, dtype=dtype) for _ in range(2))
    columns = x.shape[-1]
    rows = x.numel() // columns
    # 16 rows a program: weight and bias, which each program reads, are 3 % of its bytes.
    settings = _launch_settings(columns, program_rows=16)
    _dispatch.launch(
        _add_layer_norm_forward_kernel,
        (_dispatch.cdiv(rows, settings["PROGRAM_ROWS"]),),
        x.contiguous(),
        branch.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        normed,
        total,
        eps,
        rows,
        columns,
        **settings,
    )
    return normed, total


def _backward_triton(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    columns = total.shape[-1]
    rows = total.numel() // columns
    # 64 rows a program: the float32 partial sums are 3 % of the bytes that it moves in bfloat16.
    settings = _launch_settings(columns, program_rows=64)
    programs = _dispatch.cdiv(rows, settings["PROGRAM_ROWS"])
    grad = total.new_empty(total.shape)
    partial = total.new_empty(programs, 2, columns, dtype=torch.float32)
    _dispatch.launch(
        _add_layer_norm_backward_kernel,
        (programs,),
        grad_normed.contiguous(),
        None if grad_total is None else grad_total.contiguous(),
        total,
        weight.contiguous(),
        grad,
        partial,
        eps,
        rows,
        columns,
        **settings,
    )
    return grad, partial.sum(0).to(weight.dtype)


def _forward_torch(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return add_layer_norm_reference(x.contiguous(), branch.contiguous(), weight, bias, eps)


def _backward_torch(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(total.dtype, torch.float32)
    columns = total.shape[-1]
    upstream, values = (tensor.reshape(-1, columns).to(compute) for tensor in (grad_normed, total))
    values = values - values.mean(-1, keepdim=True)
    factor = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    values.mul_(factor)
    sums = torch.stack([(upstream * values).sum(0), upstream.sum(0)])
    upstream = upstream * weight.to(compute)
    values.mul_((upstream * values).mean(-1, keepdim=True))
    grad = (upstream - upstream.mean(-1, keepdim=True)).sub_(values).mul_(factor).view(total.shape)
    if grad_total is not None:
        grad.add_(grad_total)
    return grad.to(total.dtype), sums.to(weight.dtype)


@operation("add_layer_norm")
def _add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    forward = _forward_triton if _dispatch.use_triton(x) else _forward_torch
    return forward(x, branch, weight, bias, eps)


@_add_layer_norm.register_fake
def _(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)


@operation("add_layer_norm_backward")
def _add_layer_norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    backward = _backward_triton if _dispatch.use_triton(total) else _backward_torch
    return backward(grad_normed, grad_total, total, weight, eps)


@_add_layer_norm_backward.register_fake
def _(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(2, total.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    x, branch, weight, _, ctx.eps = inputs
    ctx.dtypes = x.dtype, branch.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _backward(ctx, grad_normed: Tensor | None, grad_total: Tensor | None):
    total, weight = ctx.saved_tensors
    grad, grad_weight, grad_bias = grad_total, None, None
    if grad_normed is not None:
        grad, sums = _add_layer_norm_backward(grad_normed, grad_total, total, weight, ctx.eps)
        grad_weight, grad_bias = sums[0], sums[1]
    if grad is None:
        return None, None, None, None, None
    return *(grad.to(dtype) for dtype in ctx.dtypes), grad_weight, grad_bias, None


_add_layer_norm.register_autograd(_backward, setup_context=_setup_context)


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum.

    The sum is rounded once to its dtype, and what is normalised is the rounded sum, as in separate operations.
    Statistics and the normalised row are in float32 (in float64 for such inputs, in plain PyTorch only). The
    gradients of weight and bias are summed in float32 in two deterministic stages; `x` and `branch` of one
    dtype get the same tensor as their gradient.

    Args:
        x: [R, D] or [B, N, D] float, the residual stream; D is at most 4096.
        branch: the shape of `x`, float: what an attention or an MLP computed. Strides may be any; a tensor whose
            rows do not follow each other is copied.
        weight, bias: [D] float, of one dtype.
        eps: added to a row's biased variance.

    Returns:
        normed: x's shape, LayerNorm of the sum.
        total: x's shape, the sum. Both are in the dtype that PyTorch promotes `x` and `branch` to.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes or devices that do not fit; no rows; rows wider than 4096; eps not positive.

    Source: pre-norm blocks, x + f(LayerNorm(x)) (ViT, Dosovitskiy et al., ICLR 2021, equations 2 and 3).
    """
    wanted = "[B, N, D]" if isinstance(x, Tensor) and x.ndim == 3 else "[R, D]"
    _dispatch.check_tensor("x", x, wanted, _dispatch.FLOAT_DTYPES)
    _dispatch.check_tensor("branch", branch, wanted, _dispatch.FLOAT_DTYPES, x.device)
    _dispatch.check_shape("branch", branch, wanted, tuple(x.shape))
    if x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}; wanted at least one row and one column")
    if x.shape[-1] > MAX_COLUMNS:
        raise ValueError(f"x has shape {list(x.shape)}; wanted at most {MAX_COLUMNS} columns")
    _dispatch.check_tensor("weight", weight, "[D]", _dispatch.FLOAT_DTYPES, x.device)
    _dispatch.check_tensor("bias", bias, "[D]", (weight.dtype,), x.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _dispatch.check_shape(name, tensor, "[D]", (x.shape[-1],))
    if not eps > 0:
        raise ValueError(f"eps is {eps}; wanted a positive number")
    return _add_layer_norm(x, branch, weight, bias, eps)
