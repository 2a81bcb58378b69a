"""Squared or absolute error on removed patches; the target is computed from the image inside the kernel."""

import torch
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation
from .gather_patches import (
    check_images,
    gather_patches_reference,
    load_normalised_patches,
    load_normalised_patches_torch,
    patch_launch_settings,
)
from .scale_gradient import scale_gradient

LOSSES = ("mse", "l1")

EPSILON = 1e-6
"""Added to a patch's variance when targets are normalised per patch (MAE's value)."""


def masked_pixel_loss_reference(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool = False,
    loss: str = "mse",
) -> tuple[Tensor, Tensor]:
    """MAE's loss, or SimMIM's. pred [B, M, P*P*C], images [B, H, W, C], ids_mask [B, M] -> loss [], per_patch [B, M].

    Computed in float32, or in float64 if `pred` is that.
    """
    compute = torch.promote_types(pred.dtype, torch.float32)
    target = gather_patches_reference(images, ids_mask, patch_size, mean, std, compute)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + EPSILON).sqrt()
    difference = pred.to(compute) - target
    per_patch = (difference.abs() if loss == "l1" else difference.square()).mean(-1)
    return per_patch.mean(), per_patch.detach()


@kernel
def _masked_pixel_loss_forward_kernel(
    pred,
    images,
    ids,
    mean,
    std,
    per_patch,
    gradient,
    epsilon,
    stride_pred_batch,
    stride_pred_row,
    stride_pred_column,
    patches,
    per_sample,
    grid_width,
    stride_image,
    stride_row,
    stride_column,
    stride_channel,
    stride_ids_batch,
    stride_ids_column,
    NORMALISE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    PRED_PACKED: tl.constexpr,
    STORE_GRADIENT: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LENGTH: tl.constexpr = PATCH * PATCH * CHANNELS
    patch = tl.program_id(0) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    element = tl.arange(0, BLOCK)
    target = load_normalised_patches(
        images,
        ids,
        mean,
        std,
        patch,
        patches,
        per_sample,
        grid_width,
        stride_image,
        stride_row,
        stride_column,
        stride_channel,
        stride_ids_batch,
        stride_ids_column,
        PATCH,
        CHANNELS,
        PACKED,
        BLOCK,
    )
    inside = (element < LENGTH)[None, :]
    if NORMALISE:
        average = tl.div_rn(tl.sum(tl.where(inside, target, 0.0), axis=1), LENGTH * 1.0)
        target = tl.where(inside, target - average[:, None], 0.0)
        variance = tl.sum(target * target, axis=1) / (LENGTH - 1)
        target = target / tl.sqrt(variance + epsilon)[:, None]
    valid = (patch < patches)[:, None] & inside
    out_at = patch.to(tl.int64)[:, None] * LENGTH + element[None, :]
    # PRED_PACKED: rows follow each other at a constant distance, which tells the compiler how wide it may load.
    if PRED_PACKED:
        pred_at = out_at
    else:
        batch = (patch // per_sample).to(tl.int64)
        row_at = batch * stride_pred_batch + (patch % per_sample).to(tl.int64) * stride_pred_row
        pred_at = row_at[:, None] + element.to(tl.int64)[None, :] * stride_pred_column
    predicted = tl.load(pred + pred_at, mask=valid, other=0.0)
    error = tl.where(valid, predicted.to(tl.float32) - target, 0.0)
    if ABSOLUTE:
        errors, direction = tl.abs(error), (error > 0).to(tl.float32) - (error < 0).to(tl.float32)
    else:
        errors, direction = error * error, error
    tl.store(per_patch + patch, tl.sum(errors, axis=1) / LENGTH, mask=patch < patches)
    if STORE_GRADIENT:
        tl.store(gradient + out_at, direction.to(gradient.dtype.element_ty), mask=valid)


def _forward_triton(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool,
    loss: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _dispatch.check_kernel_dtype("pred", pred)
    per_patch = pred.new_empty(ids_mask.shape, dtype=torch.float32)
    gradient = pred.new_empty(pred.shape if needs_grad else 0)
    programs, num_warps, integers, constants = patch_launch_settings(images, ids_mask, patch_size)
    _dispatch.launch(
        _masked_pixel_loss_forward_kernel,
        (programs,),
        pred,
        images,
        ids_mask,
        mean.contiguous(),
        std.contiguous(),
        per_patch,
        gradient,
        EPSILON,
        *pred.stride(),
        *integers,
        num_warps=num_warps,
        NORMALISE=norm_pix,
        ABSOLUTE=loss == "l1",
        PRED_PACKED=pred.is_contiguous(),
        STORE_GRADIENT=needs_grad,
        **constants,
    )
    return per_patch.mean(), per_patch, gradient


def _forward_torch(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool,
    loss: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(pred.dtype, torch.float32)
    target = load_normalised_patches_torch(images, ids_mask, patch_size, mean, std, compute)
    if norm_pix:
        # Two passes, as in the kernel; `torch.var` costs ten times as much on the CPU.
        target.sub_(target.mean(-1, keepdim=True))
        variance = _sum_of_squares(target).div_(target.shape[-1] - 1)
        target.div_(variance.add_(EPSILON).sqrt_()[..., None])
    difference = torch.sub(pred, target, out=target)
    if loss == "l1":
        # Row by row of a patch: one sum over a long patch loses bits that the kernel's tree of sums keeps.
        rows = difference.unflatten(-1, (patch_size, -1))
        per_patch = torch.linalg.vector_norm(rows, ord=1, dim=-1).sum(-1)
    else:
        per_patch = _sum_of_squares(difference)
    per_patch.div_(difference.shape[-1])
    if not needs_grad:
        return per_patch.mean(), per_patch, pred.new_empty(0)
    gradient = difference.sign_() if loss == "l1" else difference
    return per_patch.mean(), per_patch, gradient.to(pred.dtype)


def _sum_of_squares(x: Tensor) -> Tensor:
    # A norm reads x once; squaring first would write a temporary of its size.
    return torch.linalg.vector_norm(x, dim=-1).square_()


@operation("masked_pixel_loss")
def _masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool,
    loss: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    patches = (images.shape[1] // patch_size) * (images.shape[2] // patch_size)
    _dispatch.check_range("ids_mask", ids_mask, 0, patches)
    forward = _forward_triton if _dispatch.use_triton(pred) else _forward_torch
    return forward(pred, images, ids_mask, patch_size, mean, std, norm_pix, loss, needs_grad)


@_masked_pixel_loss.register_fake
def _(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool,
    loss: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(pred.dtype, torch.float32)
    per_patch = pred.new_empty(ids_mask.shape, dtype=compute)
    return per_patch.new_empty(()), per_patch, pred.new_empty(pred.shape if needs_grad else 0)


def _setup_context(ctx, inputs, output) -> None:
    # Autograd would write zeros the size of pred for the outputs that nobody differentiates.
    ctx.set_materialize_grads(False)
    ctx.factor = 1.0 if inputs[7] == "l1" else 2.0
    ctx.save_for_backward(output[2])


def _backward(ctx, grad: Tensor | None, grad_per_patch: None, grad_gradient: None):
    if grad is None:
        return (None,) * 9
    # d loss / d pred = 2 (pred - target) / (B M L), or sign(pred - target) / (B M L).
    (gradient,) = ctx.saved_tensors
    grad_pred = scale_gradient(grad, gradient, gradient.numel(), ctx.factor, gradient.dtype)
    return grad_pred, *(None,) * 8


_masked_pixel_loss.register_autograd(_backward, setup_context=_setup_context)


def masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool = False,
    loss: str = "mse",
) -> tuple[Tensor, Tensor]:
    """Mean over removed patches of the mean error, squared or absolute, between predictions and pixels.

    The forward pass also writes pred - target, or its sign, for the backward pass, if `pred` requires a gradient.
    Statistics, errors and sums are in float32 (in float64 for a float64 `pred`, in plain PyTorch only).

    Args:
        pred: [B, M, P*P*C] float, any strides: row in patch, column in patch, channel.
        images: [B, H, W, C], any strides: uint8, 0 to 255, or float32, bfloat16 or float16 in units where white is
            1. Images [B, C, H, W] are passed as `images.permute(0, 2, 3, 1)` and read where they lie.
        ids_mask: [B, M] int64 or int32, any strides: removed patches, row-major in the (H/P) x (W/P) grid.
        patch_size: P, in pixels; divides H and W.
        mean: [C] float32, in units where white is 1.
        std: [C] float32, in the same unit.
        norm_pix: normalise each target patch to (t - mean_p) / sqrt(var_p + 1e-6), unbiased variance.
        loss: "mse", or "l1" for the mean absolute error, whose gradient at 0 is 0.

    Returns:
        loss: float32 scalar.
        per_patch: [B, M] float32, mean error of each patch, without gradient.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes, batches or devices that do not fit; no ids; ids out of range (see `_dispatch`); images
            that require a gradient; another loss.

    Source: MAE (He et al., CVPR 2022, section 3, "Reconstruction target"); L1: SimMIM (Xie et al., CVPR 2022,
    section 3.4).
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; wanted one of {', '.join(LOSSES)}")
    check_images(images, patch_size, mean, std)
    _dispatch.check_ids("ids_mask", ids_mask, images, "images", "M")
    _dispatch.check_tensor("pred", pred, "[B, M, P*P*C]", _dispatch.FLOAT_DTYPES, images.device)
    length = patch_size * patch_size * images.shape[3]
    _dispatch.check_shape("pred", pred, "[B, M, P*P*C]", (*ids_mask.shape, length))
    if norm_pix and length < 2:
        raise ValueError(
            f"norm_pix with {length} value per patch; wanted 2 or more: the variance is unbiased"
        )
    needs_grad = torch.is_grad_enabled() and pred.requires_grad
    mean_error, per_patch, _ = _masked_pixel_loss(
        pred, images, ids_mask, patch_size, mean, std, norm_pix, loss, needs_grad
    )
    return mean_error, per_patch.detach()
