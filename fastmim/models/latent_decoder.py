"""CAE's decoder, which sees predicted latents only: Chen et al., IJCV 2024."""

from torch import Tensor, nn

from fastmim.config import Config
from fastmim.kernels import gather_tokens
from fastmim.models.blocks import Blocks, LayerNorm, init_weights
from fastmim.models.position import sincos_positions


class LatentDecoder(nn.Module):
    """Self-attention over the latents of removed patches; nothing of a visible patch enters.

    Args:
        config: of the run; `objective.decoder_depth`, `model`, `data` and `train` are read.
        attention: backend, from `choose_attention`.
    """

    pos_embed: Tensor

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__()
        model = config.model
        table = sincos_positions(model.width, config.grid, config.positions_grid)
        self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = Blocks(
            model.width,
            config.objective.decoder_depth,
            model.heads,
            model.mlp_ratio,
            model.drop_path,
            attention,
            config.train.activation_checkpointing,
        )
        self.norm = LayerNorm(model.width)
        self.apply(init_weights)

    def forward(self, latents: Tensor, ids: Tensor) -> Tensor:
        """Features for a head.

        Args:
            latents: Z_m [B, M, D] from the regressor.
            ids: int64 [B, M], their patches.

        Returns:
            [B, M, D].
        """
        positions = self.pos_embed.to(latents.dtype).expand(len(ids), -1, -1)
        return self.norm(self.blocks(latents + gather_tokens(positions, ids, offset=1)))
