"""Mean squared error on removed patches; the target is computed from the image bytes inside the kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from .gather_patches import (
    check_images,
    gather_patches_reference,
    load_normalised_patches,
    load_normalised_patches_torch,
    patch_launch_settings,
)

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
) -> tuple[Tensor, Tensor]:
    """MAE's loss. pred [B, M, P*P*C], images [B, H, W, C], ids_mask [B, M] -> loss [], per_patch [B, M].

    Computed in float32, or in float64 if `pred` is that.
    """
    compute = torch.promote_types(pred.dtype, torch.float32)
    target = gather_patches_reference(images, ids_mask, patch_size, mean, std, compute)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + EPSILON).sqrt()
    per_patch = (pred.to(compute) - target).square().mean(-1)
    return per_patch.mean(), per_patch.detach()


@kernel
def _masked_pixel_loss_forward_kernel(
    pred,
    images,
    ids,
    mean,
    std,
    per_patch,
    difference,
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
    STORE_DIFFERENCE: tl.constexpr,
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
        average = tl.sum(tl.where(inside, target, 0.0), axis=1) / LENGTH
        target = tl.where(inside, target - average[:, None], 0.0)
        variance = tl.sum(target * target, axis=1) / (LENGTH - 1)
        target = target / tl.sqrt(variance + epsilon)[:, None]
    valid = (patch < patches)[:, None] & inside
    batch = (patch // per_sample).to(tl.int64)
    pred_at = batch * stride_pred_batch + (patch % per_sample).to(tl.int64) * stride_pred_row
    predicted = tl.load(
        pred + pred_at[:, None] + element.to(tl.int64)[None, :] * stride_pred_column, mask=valid, other=0.0
    )
    error = tl.where(valid, predicted.to(tl.float32) - target, 0.0)
    tl.store(per_patch + patch, tl.sum(error * error, axis=1) / LENGTH, mask=patch < patches)
    if STORE_DIFFERENCE:
        out_at = patch.to(tl.int64)[:, None] * LENGTH + element[None, :]
        tl.store(difference + out_at, error.to(difference.dtype.element_ty), mask=valid)


@kernel
def _masked_pixel_loss_backward_kernel(grad, difference, grad_pred, scale, size, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad) * scale
    values = tl.load(difference + element, mask=element < size, other=0.0).to(tl.float32) * factor
    tl.store(grad_pred + element, values.to(grad_pred.dtype.element_ty), mask=element < size)


def _forward_triton(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _dispatch.check_kernel_dtype("pred", pred)
    per_patch = pred.new_empty(ids_mask.shape, dtype=torch.float32)
    difference = pred.new_empty(pred.shape if needs_grad else 0)
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
        difference,
        EPSILON,
        *pred.stride(),
        *integers,
        num_warps=num_warps,
        NORMALISE=norm_pix,
        STORE_DIFFERENCE=needs_grad,
        **constants,
    )
    return per_patch.mean(), per_patch, difference


def _backward_triton(grad: Tensor, difference: Tensor) -> Tensor:
    grad_pred = torch.empty_like(difference)
    block = 2048
    _dispatch.launch(
        _masked_pixel_loss_backward_kernel,
        (triton.cdiv(difference.numel(), block),),
        grad,
        difference,
        grad_pred,
        2 / difference.numel(),
        difference.numel(),
        BLOCK=block,
    )
    return grad_pred


def _forward_torch(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool,
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
    per_patch = _sum_of_squares(difference).div_(difference.shape[-1])
    return per_patch.mean(), per_patch, difference.to(pred.dtype) if needs_grad else pred.new_empty(0)


def _sum_of_squares(x: Tensor) -> Tensor:
    # A norm reads x once; squaring first would write a temporary of its size.
    return torch.linalg.vector_norm(x, dim=-1).square_()


def _backward_torch(grad: Tensor, difference: Tensor) -> Tensor:
    compute = torch.promote_types(difference.dtype, torch.float32)
    return difference.to(compute).mul(grad.to(compute) * (2 / difference.numel())).to(difference.dtype)


@torch.library.custom_op("fastmim::masked_pixel_loss", mutates_args=())
def _masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    patches = (images.shape[1] // patch_size) * (images.shape[2] // patch_size)
    _dispatch.check_range("ids_mask", ids_mask, 0, patches)
    forward = _forward_triton if _dispatch.use_triton(pred) else _forward_torch
    return forward(pred, images, ids_mask, patch_size, mean, std, norm_pix, needs_grad)


@_masked_pixel_loss.register_fake
def _(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(pred.dtype, torch.float32)
    per_patch = pred.new_empty(ids_mask.shape, dtype=compute)
    return per_patch.new_empty(()), per_patch, pred.new_empty(pred.shape if needs_grad else 0)


@torch.library.custom_op("fastmim::masked_pixel_loss_backward", mutates_args=())
def _masked_pixel_loss_backward(grad: Tensor, difference: Tensor) -> Tensor:
    # d loss / d pred = 2 (pred - target) / (B M L). The factor is applied here, with the incoming gradient
    # and in float32: on its own it is near 1e-8 at training sizes, below what float16 can hold. It is not an
    # argument: under dynamic shapes Inductor would pass the float of the first shape it saw.
    backward = _backward_triton if _dispatch.use_triton(difference) else _backward_torch
    return backward(grad, difference)


@_masked_pixel_loss_backward.register_fake
def _(grad: Tensor, difference: Tensor) -> Tensor:
    return torch.empty_like(difference)


def _setup_context(ctx, inputs, output) -> None:
    # Autograd would write zeros the size of pred for the outputs that nobody differentiates.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx, grad: Tensor | None, grad_per_patch: None, grad_difference: None):
    (difference,) = ctx.saved_tensors
    grad_pred = None if grad is None else _masked_pixel_loss_backward(grad, difference)
    return grad_pred, None, None, None, None, None, None, None


_masked_pixel_loss.register_autograd(_backward, setup_context=_setup_context)


def masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    norm_pix: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean over removed patches of the mean squared error between predictions and pixels.

    The forward pass also writes pred - target for the backward pass, if `pred` requires a gradient.
    Statistics, errors and sums are in float32 (in float64 for a float64 `pred`, in plain PyTorch only).

    Args:
        pred: [B, M, P*P*C] float, any strides: row in patch, column in patch, channel.
        images: [B, H, W, C] uint8, any strides.
        ids_mask: [B, M] int64 or int32, any strides: removed patches, row-major in the (H/P) x (W/P) grid.
        patch_size: P, in pixels; divides H and W.
        mean: [C] float32, in units of the 0..1 range (pixel / 255).
        std: [C] float32, in the same unit.
        norm_pix: normalise each target patch to (t - mean_p) / sqrt(var_p + 1e-6), unbiased variance.

    Returns:
        loss: float32 scalar.
        per_patch: [B, M] float32, mean squared error of each patch, without gradient.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes, batches or devices that do not fit; no ids; ids out of range (see `_dispatch`).

    Source: MAE (He et al., CVPR 2022, section 3, "Reconstruction target").
    """
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
    loss, per_patch, _ = _masked_pixel_loss(
        pred, images, ids_mask, patch_size, mean, std, norm_pix, needs_grad
    )
    return loss, per_patch.detach()
