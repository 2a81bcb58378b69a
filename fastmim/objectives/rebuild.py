"""Turn predictions of removed patches into images."""

import torch
from torch import Tensor

from fastmim.masking import Mask
from fastmim.models.pixels import PixelScale

NOTE = "trained with norm_pix: mean and contrast of a removed patch are estimated from the visible patches"


def fill_removed(
    images: Tensor,
    mask: Mask,
    pixels: Tensor,
    patch_size: int,
    scale: PixelScale,
    norm_pix: bool,
) -> Tensor:
    """The images with removed patches replaced by predictions.

    A prediction that was trained normalised per patch has no mean and contrast of its own; it is given those of
    the visible patches, the nearer the more. Nothing is read of a removed patch.

    Args:
        images: uint8 [B, H, W, C].
        mask: what was visible.
        pixels: float32 [B, M, P * P * C], predictions in normalised units, in the order of `mask.ids_mask`.
        patch_size: P.
        scale: pixel statistics.
        norm_pix: whether predictions are normalised per patch.

    Returns:
        uint8 [B, H, W, C].
    """
    batch, height, width, channels = images.shape
    rows, columns, size = height // patch_size, width // patch_size, patch_size
    grid = images.view(batch, rows, size, columns, size, channels).transpose(2, 3)
    # A clone, since an image of one column of patches is already in their order and would be written into.
    patches = grid.clone(memory_format=torch.contiguous_format).view(batch, rows * columns, -1)
    sample = torch.arange(batch, device=images.device)[:, None]
    if norm_pix:
        visible = patches[sample, mask.ids_keep].view(batch, -1, size * size, channels)
        visible = scale.normalize(visible).flatten(2)
        nearness = _nearness(mask.ids_mask, mask.ids_keep, columns)  # [B, M, K]
        mean = nearness @ visible.mean(-1, keepdim=True)
        contrast = nearness @ (visible.var(-1, keepdim=True) + 1e-6).sqrt()
        pixels = pixels * contrast + mean
    values = scale.to_bytes(pixels.view(batch, -1, size * size, channels))
    patches[sample, mask.ids_mask] = values.flatten(2)
    return patches.view(batch, rows, columns, size, size, channels).transpose(2, 3).reshape(images.shape)


def _nearness(ids: Tensor, ids_keep: Tensor, columns: int) -> Tensor:
    """Inverse squared distance between patches, [B, M, K], rows summing to 1."""

    def places(ids: Tensor) -> Tensor:
        return torch.stack([ids // columns, ids % columns], dim=-1).float()

    nearness = torch.cdist(places(ids), places(ids_keep)).pow(-2)
    return nearness / nearness.sum(-1, keepdim=True)
