"""The same work in plain PyTorch, in the formulation that public MAE code bases share."""

import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [B, C, H, W] into patch vectors [B, N, P*P*C]."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return torch.einsum("bcrpsq->brspqc", grid).reshape(batch, rows * columns, -1)


def expand_ids(ids: Tensor, width: int) -> Tensor:
    """Repeat ids [B, K] over D, as `torch.gather` wants them: [B, K, D]."""
    return ids.unsqueeze(-1).repeat(1, 1, width)


def normalise_patchify_gather(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Normalise whole images [B, H, W, C], cut all patches, select the kept ones."""
    pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 255
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    patches = patchify(pixels, patch_size)
    return torch.gather(patches, 1, expand_ids(ids, patches.shape[2])).to(dtype)


def gather(x: Tensor, ids: Tensor) -> Tensor:
    """Select tokens of x [B, N, D] by ids [B, K]."""
    return torch.gather(x, 1, expand_ids(ids, x.shape[2]))


def scatter(x: Tensor, ids: Tensor, tokens: int) -> Tensor:
    """Put tokens x [B, K, D] at ids [B, K] among zeros."""
    zeros = x.new_zeros(x.shape[0], tokens, x.shape[2])
    return zeros.scatter_(1, expand_ids(ids, x.shape[2]), x)


def assemble_decoder_input(
    latent: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor
) -> Tensor:
    """Append mask tokens, restore the order, put the cls token back, add positions."""
    batch, tokens = ids_restore.shape
    mask_tokens = mask_token.repeat(batch, tokens + 1 - latent.shape[1], 1)
    shuffled = torch.cat([latent[:, 1:], mask_tokens], dim=1)
    restored = torch.gather(shuffled, 1, expand_ids(ids_restore, latent.shape[2]))
    return torch.cat([latent[:, :1], restored], dim=1) + pos_embed


def loss_over_all_patches(pred: Tensor, images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Score every patch, then keep the removed ones by multiplication with the mask.

    pred [B, N, P*P*C] and normalised float images [B, C, H, W]: a network that predicts every patch, and a
    loader that normalises, whose work is not counted. mask [B, N], 1 where removed.
    """
    target = patchify(images, patch_size)
    average = target.mean(dim=-1, keepdim=True)
    variance = target.var(dim=-1, keepdim=True)
    target = (target - average) / (variance + 1e-6) ** 0.5
    per_patch = ((pred - target) ** 2).mean(dim=-1)
    return (per_patch * mask).sum() / mask.sum()


def random_masking(batch: int, patches: int, kept: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sort noise twice, and fill and reorder a mask."""
    noise = torch.rand(batch, patches, device=device)
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = torch.ones(batch, patches, device=device)
    mask[:, :kept] = 0
    return ids_shuffle[:, :kept], torch.gather(mask, 1, ids_restore), ids_restore


def order_by_mask(mask: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn a mask, bool [B, N], into the orders that random masking has."""
    ids_shuffle = torch.argsort(mask, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    return ids_shuffle[:, :kept], ids_shuffle[:, kept:], ids_restore, mask


def grid_masking(batch: int, rows: int, columns: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare the parity of each patch's row and column with those that are kept."""
    phase = torch.randint(0, 2, (2, batch, 1, 1), device=device)
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    mask = (row % 2 != phase[0]) | (column % 2 != phase[1])
    return order_by_mask(mask.flatten(1), rows * columns // 4)


def embed_all_then_select(x: Tensor, cls_token: Tensor, pos_embed: Tensor, ids_keep: Tensor) -> Tensor:
    """Add positions to all embedded patches [B, N, D], select the kept ones, put the cls token in front."""
    visible = gather(x + pos_embed[:, 1:], ids_keep)
    cls = (cls_token + pos_embed[:, :1]).expand(x.shape[0], -1, -1)
    return torch.cat([cls, visible], dim=1)


def add_then_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual addition, then the norm."""
    total = x + branch
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


class _BiasInProduct(torch.autograd.Function):
    """A bias that the matrix product before added without moving a byte; its gradient is a sum over rows."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        """Return x [R, D] itself."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of x, and its sum."""
        return grad, grad.flatten(0, -2).sum(0)


def gelu_after_biased_product(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x [B, N, D], the result of a product with its bias."""
    return F.gelu(_BiasInProduct.apply(x, bias))


def attend_to_unbound(qkv: Tensor) -> Tensor:
    """Take queries, keys and values [B, N, 3, H, d] apart and have PyTorch attend; backward puts them together."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def normalised_squared_error(x: Tensor, target: Tensor) -> Tensor:
    """LayerNorm without weights on both sides, then the mean squared error."""
    width = x.shape[-1:]
    return F.mse_loss(F.layer_norm(x, width, eps=1e-6), F.layer_norm(target, width, eps=1e-6))


def cosine_distance(x: Tensor, target: Tensor) -> Tensor:
    """Normalise both sides, then one minus the product."""
    return (1 - (F.normalize(x, dim=-1) * F.normalize(target, dim=-1)).sum(-1)).mean()


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(F.linear(x, weight, bias), labels)


def contrast(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The whole similarity matrix."""
    return F.cross_entropy(queries @ keys.T / temperature, labels)
