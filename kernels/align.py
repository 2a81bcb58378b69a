"""Compare two sets of features row by row: CAE's latent alignment and CAE v2's cosine distance to a teacher."""

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation
from .add_layer_norm import centre_rows

PLAIN, LAYER_NORM, COSINE = 0, 1, 2
"""How rows are compared: squared error as they are, squared error after LayerNorm, one minus the cosine."""


def mse_align_reference(
    x: Tensor, target: Tensor, eps: float = 1e-6, normalise: bool = True
) -> tuple[Tensor, Tensor]:
    """Squared error of normalised rows. x, target [R, D] or [B, M, D] -> loss [], per_row [R] or [B, M].

    Computed in float32, or in float64 if `x` or `target` is that.
    """
    compute = _compute_dtype(x, target)
    x, target = x.to(compute), target.detach().to(compute)
    if normalise:
        x, target = (F.layer_norm(rows, rows.shape[-1:], eps=eps) for rows in (x, target))
    per_row = (x - target).square().mean(-1)
    return per_row.mean(), per_row.detach()


def cosine_align_reference(x: Tensor, target: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """One minus the cosine. x, target [R, D] or [B, M, D] -> loss [], per_row [R] or [B, M].

    Computed in float32, or in float64 if `x` or `target` is that.
    """
    compute = _compute_dtype(x, target)
    x, target = (F.normalize(rows.to(compute), dim=-1, eps=eps) for rows in (x, target.detach()))
    per_row = 1 - (x * target).sum(-1)
    return per_row.mean(), per_row.detach()


def _compute_dtype(x: Tensor, target: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, target.dtype), torch.float32)


@kernel
def _load_rows(
    tensor, row, column, valid, per_sample, stride_batch, stride_row, stride_column
):  # fmt: skip
    at = (row // per_sample).to(tl.int64) * stride_batch + (row % per_sample).to(tl.int64) * stride_row
    pointers = tensor + at[:, None] + column.to(tl.int64)[None, :] * stride_column
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@kernel
def _normalise(values, valid, columns, eps, COMPARE: tl.constexpr):
    # Returns the rows, 0 outside `valid`, and what each was multiplied by after centring.
    if COMPARE == 1:
        values, factor = centre_rows(values, valid, columns, eps)
    elif COMPARE == 2:
        factor = 1.0 / tl.maximum(tl.sqrt(tl.sum(values * values, axis=1)), eps)
    else:
        factor = tl.full([values.shape[0]], 1.0, tl.float32)
    return values * factor[:, None], factor


@kernel
def _align_forward_kernel(
    x,
    target,
    per_row,
    eps,
    stride_x_batch,
    stride_x_row,
    stride_x_column,
    stride_target_batch,
    stride_target_row,
    stride_target_column,
    rows,
    per_sample,
    columns,
    COMPARE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    valid = (row < rows)[:, None] & (column < columns)[None, :]
    ours = _load_rows(x, row, column, valid, per_sample, stride_x_batch, stride_x_row, stride_x_column)
    theirs = _load_rows(
        target, row, column, valid, per_sample, stride_target_batch, stride_target_row, stride_target_column
    )
    ours, _ = _normalise(ours, valid, columns, eps, COMPARE)
    theirs, _ = _normalise(theirs, valid, columns, eps, COMPARE)
    if COMPARE == 2:
        loss = tl.sum(-ours * theirs, axis=1) + 1.0
    else:
        error = ours - theirs
        loss = tl.sum(error * error, axis=1) / columns
    tl.store(per_row + row, loss, mask=row < rows)


@kernel
def _align_backward_kernel(
    grad,
    x,
    target,
    grad_x,
    eps,
    scale,
    stride_x_batch,
    stride_x_row,
    stride_x_column,
    stride_target_batch,
    stride_target_row,
    stride_target_column,
    rows,
    per_sample,
    columns,
    COMPARE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The rows have to be read again in any case, so their statistics are recomputed in registers.
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    valid = (row < rows)[:, None] & (column < columns)[None, :]
    ours = _load_rows(x, row, column, valid, per_sample, stride_x_batch, stride_x_row, stride_x_column)
    theirs = _load_rows(
        target, row, column, valid, per_sample, stride_target_batch, stride_target_row, stride_target_column
    )
    ours, factor = _normalise(ours, valid, columns, eps, COMPARE)
    theirs, _ = _normalise(theirs, valid, columns, eps, COMPARE)
    if COMPARE == 0:
        values = ours - theirs
    elif COMPARE == 1:
        error = ours - theirs
        # The error of two centred rows is centred: of LayerNorm's two projections one remains.
        along = tl.sum(error * ours, axis=1) / columns
        values = (error - ours * along[:, None]) * factor[:, None]
    else:
        # Below eps the divisor is a constant, and nothing is projected out.
        along = tl.where(factor * eps < 1.0, tl.sum(ours * theirs, axis=1), 0.0)
        values = (ours * along[:, None] - theirs) * factor[:, None]
    values = values * (tl.load(grad) * scale)
    out_at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(grad_x + out_at, values.to(grad_x.dtype.element_ty), mask=valid)


def _launch_settings(x: Tensor, target: Tensor) -> tuple[int, int, tuple[int, ...], dict[str, int]]:
    """Return programs, warps, integer arguments and constants of both kernels."""
    for name, tensor in (("x", x), ("target", target)):
        _dispatch.check_kernel_dtype(name, tensor)
    columns = x.shape[-1]
    rows = x.numel() // columns
    per_sample = x.shape[-2]
    block = _dispatch.next_power_of_2(columns)
    block_rows = max(1, 2048 // block)
    strides = []
    for tensor in (x, target):
        strides += tensor.stride() if tensor.ndim == 3 else (0, *tensor.stride())
    constants = {"BLOCK_ROWS": block_rows, "BLOCK": block}
    integers = (*strides, rows, per_sample, columns)
    return _dispatch.cdiv(rows, block_rows), _dispatch.warps_for(block_rows * block, 8), integers, constants


def _gradient_scale(x: Tensor, compare: int) -> float:
    return 1 / x[..., 0].numel() if compare == COSINE else 2 / x.numel()


def _forward_triton(x: Tensor, target: Tensor, eps: float, compare: int) -> Tensor:
    per_row = x.new_empty(x.shape[:-1], dtype=torch.float32)
    programs, num_warps, integers, constants = _launch_settings(x, target)
    _dispatch.launch(
        _align_forward_kernel,
        (programs,),
        x,
        target,
        per_row,
        eps,
        *integers,
        num_warps=num_warps,
        COMPARE=compare,
        **constants,
    )
    return per_row


def _backward_triton(grad: Tensor, x: Tensor, target: Tensor, eps: float, compare: int) -> Tensor:
    grad_x = x.new_empty(x.shape)
    programs, num_warps, integers, constants = _launch_settings(x, target)
    _dispatch.launch(
        _align_backward_kernel,
        (programs,),
        grad,
        x,
        target,
        grad_x,
        eps,
        _gradient_scale(x, compare),
        *integers,
        num_warps=num_warps,
        COMPARE=compare,
        **constants,
    )
    return grad_x


def _normalise_torch(rows: Tensor, eps: float, compare: int) -> tuple[Tensor, Tensor]:
    if compare == LAYER_NORM:
        rows = rows - rows.mean(-1, keepdim=True)
        factor = rows.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return rows.mul_(factor), factor
    if compare == COSINE:
        factor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_(min=eps).reciprocal_()
        return rows * factor, factor
    return rows, rows.new_ones(())


def _forward_torch(x: Tensor, target: Tensor, eps: float, compare: int) -> Tensor:
    compute = _compute_dtype(x, target)
    ours, theirs = (_normalise_torch(rows.to(compute), eps, compare)[0] for rows in (x, target))
    if compare == COSINE:
        return 1 - (ours * theirs).sum(-1)
    return (ours - theirs).square_().mean(-1)


def _backward_torch(grad: Tensor, x: Tensor, target: Tensor, eps: float, compare: int) -> Tensor:
    compute = _compute_dtype(x, target)
    ours, factor = _normalise_torch(x.to(compute), eps, compare)
    theirs, _ = _normalise_torch(target.to(compute), eps, compare)
    if compare == COSINE:
        along = (ours * theirs).sum(-1, keepdim=True).masked_fill_(factor * eps >= 1, 0)
        values = (ours * along).sub_(theirs).mul_(factor)
    else:
        values = ours - theirs
        if compare == LAYER_NORM:
            values.sub_(ours * (values * ours).mean(-1, keepdim=True)).mul_(factor)
    return values.mul_(grad.to(compute) * _gradient_scale(x, compare)).to(x.dtype).contiguous()


@operation("align")
def _align(x: Tensor, target: Tensor, eps: float, compare: int) -> tuple[Tensor, Tensor]:
    forward = _forward_triton if _dispatch.use_triton(x) else _forward_torch
    per_row = forward(x, target, eps, compare)
    return per_row.mean(), per_row


@_align.register_fake
def _(x: Tensor, target: Tensor, eps: float, compare: int) -> tuple[Tensor, Tensor]:
    per_row = x.new_empty(x.shape[:-1], dtype=_compute_dtype(x, target))
    return per_row.new_empty(()), per_row


@operation("align_backward")
def _align_backward(grad: Tensor, x: Tensor, target: Tensor, eps: float, compare: int) -> Tensor:
    backward = _backward_triton if _dispatch.use_triton(x) else _backward_torch
    return backward(grad, x, target, eps, compare)


@_align_backward.register_fake
def _(grad: Tensor, x: Tensor, target: Tensor, eps: float, compare: int) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, target, ctx.eps, ctx.compare = inputs
    ctx.set_materialize_grads(False)  # nobody differentiates the loss of each row
    ctx.save_for_backward(x, target)


def _backward(ctx, grad: Tensor | None, grad_per_row: None):
    x, target = ctx.saved_tensors
    grad_x = None if grad is None else _align_backward(grad, x, target, ctx.eps, ctx.compare)
    return grad_x, None, None, None


_align.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, target: Tensor, eps: float) -> None:
    wanted = "[B, M, D]" if isinstance(x, Tensor) and x.ndim == 3 else "[R, D]"
    _dispatch.check_tensor("x", x, wanted, _dispatch.FLOAT_DTYPES)
    _dispatch.check_tensor("target", target, wanted, _dispatch.FLOAT_DTYPES, x.device)
    _dispatch.check_shape("target", target, wanted, tuple(x.shape))
    if x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}; wanted at least one row and one column")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; wanted a positive number")


def mse_align(x: Tensor, target: Tensor, eps: float = 1e-6, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """Mean squared error between LayerNorm(x) and LayerNorm(target); the target has no gradient.

    These LayerNorms have no weights, and divide by the biased variance. Norms with weights (CAE's LN_r and LN_e
    are the last norms of its regressor and encoder) are applied by the caller, with `normalise=False` here.
    Statistics, errors and sums are in float32 (in float64 where an input is that, in plain PyTorch only).

    Args:
        x: [R, D] or [B, M, D] float, any strides.
        target: the shape of `x`, float of any dtype, any strides; treated as a constant.
        eps: added to a row's variance.
        normalise: False compares the rows as they are.

    Returns:
        loss: float32 scalar, the mean over rows and columns.
        per_row: [R] or [B, M] float32, mean squared error of each row, without gradient.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes or devices that do not fit; no rows; eps not positive.

    Source: CAE (Chen et al., IJCV 2024), alignment loss MSE(LN_r(Z_m), stopgrad(LN_e(Z̄_m))), to be weighted by λ = 2.
    """
    _check(x, target, eps)
    loss, per_row = _align(x, target.detach(), eps, LAYER_NORM if normalise else PLAIN)
    return loss, per_row.detach()


def cosine_align(x: Tensor, target: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean over rows of 1 - cos(x, target), both L2-normalised; the target has no gradient.

    Norms, products and sums are in float32 (in float64 where an input is that, in plain PyTorch only).

    Args:
        x: [R, D] or [B, M, D] float, any strides.
        target: the shape of `x`, float of any dtype, any strides; treated as a constant.
        eps: lower bound of a norm, as in `torch.nn.functional.normalize`: a row of zeros has cosine 0.

    Returns:
        loss: float32 scalar.
        per_row: [R] or [B, M] float32, 1 - cos of each row, without gradient.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes or devices that do not fit; no rows; eps not positive.

    Source: CAE v2, L = mean(1 - cos(o, t)) over cls, visible and masked positions.
    """
    _check(x, target, eps)
    loss, per_row = _align(x, target.detach(), eps, COSINE)
    return loss, per_row.detach()
