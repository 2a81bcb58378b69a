"""The masked autoencoder: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022."""

from typing import Protocol

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.kernels import masked_pixel_loss
from fastmim.masking import Mask, len_keep, sample_random_mask
from fastmim.models import Encoder, MAEDecoder
from fastmim.models.pixels import PixelScale


class Images(Protocol):
    """What an objective reads of a batch.

    Attributes:
        images: uint8 [B, H, W, C].
        epochs: int64 [B].
        positions: int64 [B].
    """

    images: Tensor
    epochs: Tensor
    positions: Tensor


class MAE(nn.Module):
    """Encode the visible patches, decode, and compare the removed patches with their pixels.

    Args:
        config: of the run.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__()
        self.patch_size = config.model.patch_size
        self.norm_pix_loss = config.objective.norm_pix_loss
        self.seed = config.train.seed
        self.columns = config.grid[1]
        self.patches = config.grid[0] * self.columns
        self.keep = len_keep(self.patches, config.mask.ratio)
        self.scale = PixelScale(config.data.mean, config.data.std)
        self.encoder = Encoder(config, self.scale, attention)
        self.decoder = MAEDecoder(config, attention)

    def forward(self, batch: Images) -> dict[str, Tensor]:
        """The training loss, `{"loss": float32 scalar}`."""
        mask = self.sample_mask(batch.epochs, batch.positions)
        return {"loss": self.loss(batch.images, mask)[0]}

    def compile_blocks(self) -> None:
        """`torch.compile` each transformer block."""
        self.encoder.blocks.compile_layers()
        self.decoder.blocks.compile_layers()

    def sample_mask(self, epochs: Tensor, positions: Tensor) -> Mask:
        """The masks of samples at these epochs and positions, int64 [B] each."""
        return sample_random_mask(self.seed, epochs, positions, self.patches, self.keep)

    def note_on_pictures(self) -> str:
        """What a viewer must know of `reconstruct`; empty when predictions are plain pixels."""
        if not self.norm_pix_loss:
            return ""
        return "trained with norm_pix: mean and contrast of a removed patch are estimated from the visible patches"

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """Predictions of the removed patches, [B, M, P * P * C], normalised as the target is."""
        latent = self.encoder(images, mask.ids_keep)
        return self.decoder(latent, mask.ids_restore, mask.ids_mask)

    def loss(self, images: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Mean over removed patches of the mean squared error, and the error of each, float32 [B, M]."""
        pred = self.predict(images, mask)
        mean, std = self.scale.mean, self.scale.std
        return masked_pixel_loss(
            pred, images, mask.ids_mask, self.patch_size, mean, std, norm_pix=self.norm_pix_loss
        )

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """The images with removed patches replaced by predictions.

        With `norm_pix_loss` a prediction has no mean and contrast of its own; it is given those of the visible
        patches, the nearer the more. Nothing is read of a removed patch.

        Args:
            images: uint8 [B, H, W, C].
            mask: from `sample_mask`.

        Returns:
            uint8 [B, H, W, C].
        """
        batch, height, width, channels = images.shape
        size = self.patch_size
        grid = (batch, height // size, size, width // size, size, channels)
        # A clone, since an image of one column of patches is already in their order and would be written into.
        patches = (
            images.clone().view(grid).transpose(2, 3).reshape(batch, self.patches, size * size, channels)
        )
        pred = self.predict(images, mask).float()
        if self.norm_pix_loss:
            visible = patches[~mask.mask].view(batch, -1, size * size, channels)
            visible = ((visible.float() / 255 - self.scale.mean) / self.scale.std).flatten(2)
            nearness = self._nearness(mask)  # [B, M, K]
            mean = nearness @ visible.mean(-1, keepdim=True)
            contrast = nearness @ (visible.var(-1, keepdim=True) + 1e-6).sqrt()
            pred = pred * contrast + mean
        pixels = pred.view(-1, size * size, channels) * self.scale.std + self.scale.mean
        patches[mask.mask] = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
        grid = (batch, height // size, width // size, size, size, channels)
        return patches.view(grid).transpose(2, 3).reshape(images.shape)

    def _nearness(self, mask: Mask) -> Tensor:
        """Inverse squared distance from removed to visible patches, [B, M, K], rows summing to 1."""

        def places(ids: Tensor) -> Tensor:
            return torch.stack([ids // self.columns, ids % self.columns], dim=-1).float()

        # Both id lists ascend, as boolean indexing does.
        distance = torch.cdist(places(mask.ids_mask), places(mask.ids_keep))
        return (nearness := distance.pow(-2)) / nearness.sum(-1, keepdim=True)
