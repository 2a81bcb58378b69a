"""MAE's decoder: light, and told to predict removed patches only."""

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.kernels import gather_tokens, unshuffle
from fastmim.models.blocks import Blocks, LayerNorm, init_weights
from fastmim.models.position import sincos_positions


class MAEDecoder(nn.Module):
    """Self-attention over kept and mask tokens; the norm and the last linear run on removed patches only.

    Args:
        config: of the run; `objective`, `model` and `data` are read.
        attention: backend, from `choose_attention`.
    """

    pos_embed: Tensor

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__()
        objective = config.objective
        width = objective.decoder_width
        self.embed = nn.Linear(config.model.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, config.grid), persistent=False)
        self.blocks = Blocks(
            width,
            objective.decoder_depth,
            objective.decoder_heads,
            attention=attention,
            checkpointing=config.train.activation_checkpointing,
        )
        self.norm = LayerNorm(width)
        self.pred = nn.Linear(width, config.model.patch_size**2 * config.data.channels)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_restore: Tensor, ids_mask: Tensor) -> Tensor:
        """Predict the removed patches.

        Args:
            latent: [B, 1 + K, D] from the encoder.
            ids_restore: int64 [B, N]; position n holds kept row `ids_restore[n]`, or is removed where that is >= K.
            ids_mask: int64 [B, M], the removed positions.

        Returns:
            [B, M, P * P * C], in the order of `ids_mask`.
        """
        x = self.embed(latent)
        x = unshuffle(x, self.mask_token, self.pos_embed.to(x.dtype), ids_restore)
        x = gather_tokens(self.blocks(x), ids_mask, offset=1)
        return self.pred(self.norm(x))
