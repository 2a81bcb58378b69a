"""The ViT encoder, which sees, embeds and stores visible patches only."""

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.kernels import embed_tokens, gather_patches, unshuffle
from fastmim.masking import Mask
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
        mask_token: all positions go through the blocks, removed ones as a learned token (MAE, Table 1c).
    """

    pos_embed: Tensor
    mask_token: Tensor | None

    def __init__(self, config: Config, scale: PixelScale, attention: str = "sdpa", mask_token: bool = False):
        super().__init__()
        model = config.model
        self.patch_size = model.patch_size
        self.scale = scale
        self.patch_embed = nn.Linear(model.patch_size**2 * config.data.channels, model.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, model.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.width)) if mask_token else None
        table = sincos_positions(model.width, config.grid, config.positions_grid)
        if model.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty_like(table))
        else:
            self.register_buffer("pos_embed", table, persistent=False)
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
        if model.positions == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Mask, every_layer: bool = False) -> Tensor | list[Tensor]:
        """Encode the kept patches.

        Args:
            images: uint8 [B, H, W, C].
            mask: what is kept.
            every_layer: return the input of the first block and the output of each, without the last norm.

        Returns:
            [B, 1 + K, D], the cls token first, then the patches in the order of `mask.ids_keep`; with a mask token
            [B, 1 + N, D], in the order of the image. A list of depth + 1 of these where `every_layer`.
        """
        dtype = self.patch_embed.weight.dtype
        patches = gather_patches(
            images, mask.ids_keep, self.patch_size, self.scale.mean, self.scale.std, dtype
        )
        pos_embed = self.pos_embed.to(dtype)
        x = self.patch_embed(patches)
        if self.mask_token is None:
            x = embed_tokens(x, self.cls_token, pos_embed, mask.ids_restore)
        else:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            x = unshuffle(x, self.mask_token, pos_embed, mask.ids_restore)
        return [x, *self.blocks(x, every_layer=True)] if every_layer else self.norm(self.blocks(x))
