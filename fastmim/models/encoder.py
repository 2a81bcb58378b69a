"""The ViT encoder, which sees, embeds and stores visible patches only."""

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.kernels import embed_tokens, gather_patches
from fastmim.models.blocks import Blocks, LayerNorm, init_weights
from fastmim.models.pixels import PixelScale
from fastmim.models.position import sincos_positions


class Encoder(nn.Module):
    """A ViT over the patches that a mask keeps.

    Patches are gathered from the bytes of the image before they are embedded, so a removed patch costs neither
    memory nor time. The patch embedding is a linear over (row, column, channel) values.

    Args:
        config: of the run; `model`, `data` and `train` are read.
        scale: pixel statistics.
        attention: backend, from `choose_attention`.
    """

    pos_embed: Tensor

    def __init__(self, config: Config, scale: PixelScale, attention: str = "sdpa"):
        super().__init__()
        model = config.model
        self.patch_size = model.patch_size
        self.scale = scale
        self.patch_embed = nn.Linear(model.patch_size**2 * config.data.channels, model.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, model.width))
        self.register_buffer("pos_embed", sincos_positions(model.width, config.grid), persistent=False)
        self.blocks = Blocks(
            model.width,
            model.depth,
            model.heads,
            model.mlp_ratio,
            model.drop_path,
            attention,
            config.train.activation_checkpointing,
        )
        self.norm = LayerNorm(model.width)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Encode the kept patches.

        Args:
            images: uint8 [B, H, W, C].
            ids_keep: int64 [B, K], row-major patch indices.

        Returns:
            [B, 1 + K, D], the cls token first, then the patches in the order of `ids_keep`.
        """
        dtype = self.patch_embed.weight.dtype
        patches = gather_patches(images, ids_keep, self.patch_size, self.scale.mean, self.scale.std, dtype)
        x = embed_tokens(self.patch_embed(patches), self.cls_token, self.pos_embed.to(dtype), ids_keep)
        return self.norm(self.blocks(x))
