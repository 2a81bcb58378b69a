"""MAE's decoder: light, and asked for removed patches only."""

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.kernels import unshuffle
from fastmim.models.blocks import Blocks, LayerNorm, init_weights
from fastmim.models.position import sincos_positions


class MAEDecoder(nn.Module):
    """Self-attention over kept and mask tokens; the last MLP and norm run on the patches that are asked for only.

    Args:
        config: of the run; `objective`, `model` and `data` are read.
        attention: backend, from `choose_attention`.
        mask_token: whether removed positions are filled here; False where the encoder holds all positions.
    """

    pos_embed: Tensor
    mask_token: Tensor | None

    def __init__(self, config: Config, attention: str = "sdpa", mask_token: bool = True):
        super().__init__()
        objective = config.objective
        width = objective.decoder_width
        self.embed = nn.Linear(config.model.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if mask_token else None
        table = sincos_positions(width, config.grid, config.positions_grid)
        self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = Blocks(
            width,
            objective.decoder_depth,
            objective.decoder_heads,
            attention=attention,
            checkpointing=config.train.activation_checkpointing,
        )
        self.norm = LayerNorm(width)
        self.apply(init_weights)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_restore: Tensor, ids: Tensor) -> Tensor:
        """Features of the removed patches, for a head.

        Args:
            latent: [B, 1 + K, D] from the encoder.
            ids_restore: int64 [B, N]; position n holds kept row `ids_restore[n]`, or is removed where that is >= K.
                Not read where the encoder holds all positions.
            ids: int64 [B, M], the positions that are asked for.

        Returns:
            [B, M, decoder width], in the order of `ids`.
        """
        x = self.embed(latent)
        positions = self.pos_embed.to(x.dtype)
        x = (
            x + positions
            if self.mask_token is None
            else unshuffle(x, self.mask_token, positions, ids_restore)
        )
        return self.norm(self.blocks(x, ids=ids))
