"""Read the kept patches of images, normalised, in one pass."""

import torch
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation

IMAGE_DTYPES = (torch.uint8, *_dispatch.KERNEL_DTYPES)


def gather_patches_reference(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Patchify, select, normalise. images [B, H, W, C], ids [B, K] -> [B, K, P*P*C] in `dtype`.

    Bytes are divided by 255. Computed in float32, or in float64 if `dtype` is that.
    """
    batch, height, width, channels = images.shape
    compute = torch.promote_types(dtype, torch.float32)
    grid = images.reshape(batch, height // patch_size, patch_size, width // patch_size, patch_size, channels)
    patches = grid.permute(0, 1, 3, 2, 4, 5).flatten(1, 2)  # [B, N, P, P, C]
    kept = patches[torch.arange(batch, device=ids.device)[:, None], ids].to(compute)
    if images.dtype == torch.uint8:
        kept = kept / 255
    return ((kept - mean.to(compute)) / std.to(compute)).flatten(2).to(dtype)


@kernel
def load_normalised_patches(
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
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Load normalised pixels [patches of this program, BLOCK] as float32; undefined past P*P*C."""
    ROW: tl.constexpr = PATCH * CHANNELS
    element = tl.arange(0, BLOCK)
    inside = element % ROW
    batch = (patch // per_sample).to(tl.int64)
    ids_at = batch * stride_ids_batch + (patch % per_sample).to(tl.int64) * stride_ids_column
    place = tl.load(ids + ids_at, mask=patch < patches, other=0).to(tl.int32)
    patch_at = (
        batch * stride_image
        + (place // grid_width).to(tl.int64) * PATCH * stride_row
        + (place % grid_width).to(tl.int64) * PATCH * stride_column
    )
    # PACKED: a row of a patch is P*C consecutive values, which the compiler can load 16 bytes at a time.
    if PACKED:
        pixel_at = (element // ROW) * stride_row + inside
    else:
        pixel_at = (
            (element // ROW).to(tl.int64) * stride_row
            + (inside // CHANNELS).to(tl.int64) * stride_column
            + (inside % CHANNELS).to(tl.int64) * stride_channel
        )
    valid = (patch < patches)[:, None] & (element < PATCH * ROW)[None, :]
    pixels = tl.load(images + patch_at[:, None] + pixel_at[None, :], mask=valid, other=0).to(tl.float32)
    if images.dtype.element_ty == tl.uint8:
        pixels = pixels * (1.0 / 255.0)
    channel = inside % CHANNELS
    scale = 1.0 / tl.load(std + channel)
    return (pixels - tl.load(mean + channel)[None, :]) * scale[None, :]


@kernel
def _gather_patches_forward_kernel(
    images,
    ids,
    mean,
    std,
    out,
    patches,
    per_sample,
    grid_width,
    stride_image,
    stride_row,
    stride_column,
    stride_channel,
    stride_ids_batch,
    stride_ids_column,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LENGTH: tl.constexpr = PATCH * PATCH * CHANNELS
    patch = tl.program_id(0) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    element = tl.arange(0, BLOCK)
    values = load_normalised_patches(
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
    valid = (patch < patches)[:, None] & (element < LENGTH)[None, :]
    out_at = patch.to(tl.int64)[:, None] * LENGTH + element[None, :]
    tl.store(out + out_at, values.to(out.dtype.element_ty), mask=valid)


def patch_launch_settings(images: Tensor, ids: Tensor, patch_size: int) -> tuple[int, int, tuple, dict]:
    """Return what kernels over patches share: programs, warps, the integer arguments, the constants."""
    channels = images.shape[3]
    block = _dispatch.next_power_of_2(patch_size * patch_size * channels)
    block_patches = max(1, 1024 // block)
    integers = (
        ids.numel(),
        ids.shape[1],
        images.shape[2] // patch_size,
        *images.stride(),
        *ids.stride(),
    )
    constants = {
        "PATCH": patch_size,
        "CHANNELS": channels,
        "PACKED": images.stride(3) == 1 and images.stride(2) == channels,
        "BLOCK_PATCHES": block_patches,
        "BLOCK": block,
    }
    num_warps = _dispatch.warps_for(block_patches * block, per_thread=16)
    return _dispatch.cdiv(ids.numel(), block_patches), num_warps, integers, constants


def _forward_triton(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    out = images.new_empty(*ids.shape, patch_size * patch_size * images.shape[3], dtype=dtype)
    _dispatch.check_kernel_dtype("the result", out)
    programs, num_warps, integers, constants = patch_launch_settings(images, ids, patch_size)
    _dispatch.launch(
        _gather_patches_forward_kernel,
        (programs,),
        images,
        ids,
        mean.contiguous(),
        std.contiguous(),
        out,
        *integers,
        num_warps=num_warps,
        **constants,
    )
    return out


def _select_pixels(images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Pixels of patches in their own dtype, [B, K, P, P, C], not always contiguous; copies no other pixel."""
    batch, height, width, channels = images.shape
    grid_row, grid_column = ids // (width // patch_size), ids % (width // patch_size)
    planar = images.permute(0, 3, 1, 2)
    if images.is_contiguous():
        planes, length = 1, patch_size * channels
    elif planar.is_contiguous():
        planes, length = channels, patch_size
        images = planar
    else:
        windows = images.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
        sample = torch.arange(batch, device=ids.device)[:, None]
        return windows.permute(0, 1, 2, 4, 5, 3)[sample, grid_row, grid_column]
    # One row of a patch, in one plane, is one row of this table: `index_select` copies it at once.
    table = images.reshape(-1, length)
    plane = torch.arange(batch * planes, device=ids.device).view(batch, 1, planes, 1)
    pixel_row = plane * height + (grid_row * patch_size)[..., None, None]
    pixel_row = pixel_row + torch.arange(patch_size, device=ids.device)
    rows = pixel_row * (width // patch_size) + grid_column[..., None, None]
    pixels = table.index_select(0, rows.flatten())
    if planes == 1:
        return pixels.view(*ids.shape, patch_size, patch_size, channels)
    return pixels.view(*ids.shape, planes, patch_size, patch_size).permute(0, 1, 3, 4, 2)


def load_normalised_patches_torch(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch with few passes: pixels are selected, then converted. Returns [B, K, P*P*C] in `dtype`."""
    pixels = _select_pixels(images, ids, patch_size)
    pixels = pixels.to(dtype, memory_format=torch.contiguous_format).flatten(2)
    # The constants are repeated to a whole patch: broadcasting over C alone is an order slower.
    white = 255 if images.dtype == torch.uint8 else 1
    scale = (1 / (white * std.to(dtype))).repeat(patch_size * patch_size)
    shift = (mean.to(dtype) / std.to(dtype)).repeat(patch_size * patch_size)
    return pixels.mul_(scale).sub_(shift)


def _forward_torch(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    compute = torch.promote_types(dtype, torch.float32)
    return load_normalised_patches_torch(images, ids, patch_size, mean, std, compute).to(dtype)


@operation("gather_patches")
def _gather_patches(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    _dispatch.check_range("ids", ids, 0, (images.shape[1] // patch_size) * (images.shape[2] // patch_size))
    forward = _forward_triton if _dispatch.use_triton(images) else _forward_torch
    return forward(images, ids, patch_size, mean, std, dtype)


@_gather_patches.register_fake
def _(images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    return images.new_empty(*ids.shape, patch_size * patch_size * images.shape[3], dtype=dtype)


def check_images(images: Tensor, patch_size: int, mean: Tensor, std: Tensor) -> None:
    """Check images and their constants: TypeError for a dtype, ValueError for a shape, device or size."""
    _dispatch.check_tensor("images", images, "[B, H, W, C]", IMAGE_DTYPES)
    if images.requires_grad:
        raise ValueError("images requires a gradient; wanted images.detach(), as pixels get none")
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}; wanted 1 or more")
    for name, size in (("H", images.shape[1]), ("W", images.shape[2])):
        if size == 0 or size % patch_size != 0:
            raise ValueError(
                f"images has {name} = {size}; wanted a positive multiple of patch_size {patch_size}"
            )
    for name, constant in (("mean", mean), ("std", std)):
        _dispatch.check_tensor(name, constant, "[C]", (torch.float32,), images.device)
        _dispatch.check_shape(name, constant, "[C]", (images.shape[3],))


def gather_patches(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Read patches of images, normalised; pixels of other patches are neither read nor copied. No gradient.

    Images [B, C, H, W] are passed as `images.permute(0, 2, 3, 1)` and read where they lie.

    Args:
        images: [B, H, W, C], any strides: uint8, 0 to 255, or float32, bfloat16 or float16 in units where white is
            1, as torchvision's ToTensor gives.
        ids: [B, K] int64 or int32, any strides: patches in row-major order of the (H/P) x (W/P) grid.
        patch_size: P, in pixels; divides H and W.
        mean: [C] float32, in units where white is 1.
        std: [C] float32, in the same unit.
        dtype: of the result: float32, bfloat16 or float16 (float64 in plain PyTorch only).

    Returns:
        (pixel - mean) / std, a byte's pixel being byte / 255: [B, K, P*P*C], row in patch, column in patch, channel.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes, batches or devices that do not fit; no ids; ids out of range (see `_dispatch`); images
            that require a gradient.

    Source: patch order of MAE's patchify (He et al., CVPR 2022).
    """
    check_images(images, patch_size, mean, std)
    _dispatch.check_ids("ids", ids, images, "images", "K")
    if dtype not in _dispatch.FLOAT_DTYPES:
        raise TypeError(f"dtype is {dtype}; wanted float32, bfloat16, float16 or float64")
    return _gather_patches(images, ids, patch_size, mean, std, dtype)
