"""CAE's latent contextual regressor: Chen et al., IJCV 2024."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.flops import cross_block_flops
from fastmim.kernels import gather_tokens
from fastmim.masking import Mask
from fastmim.models.blocks import (
    MLP,
    AddLayerNorm,
    LayerNorm,
    add_mlp,
    compile_each,
    drop_path_rates,
    init_weights,
)
from fastmim.models.cross_attention import CrossAttention
from fastmim.models.position import sincos_positions
from fastmim.models.recompute import recompute


class Regressor(nn.Module):
    """Predicts the latents of removed patches from those of the visible ones.

    The queries start as one learned mask token. Each block lets them read the visible latents, which stay as the
    encoder gave them, and themselves. The cls token is not read, as in the authors' code.

    Args:
        config: of the run; `objective.regressor_depth`, `model`, `data` and `train` are read.
        attention: backend, from `choose_attention`.
    """

    pos_embed: Tensor

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__()
        model, depth = config.model, config.objective.regressor_depth
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.width))
        table = sincos_positions(model.width, config.grid, config.positions_grid)
        self.register_buffer("pos_embed", table, persistent=False)
        rates = drop_path_rates(model.drop_path, depth)
        self.layers = nn.ModuleList(
            RegressorBlock(model.width, model.heads, model.mlp_ratio, rate, attention) for rate in rates
        )
        self.norm = LayerNorm(model.width)
        self.checkpointing = config.train.activation_checkpointing
        self.mlp_ratio = model.mlp_ratio
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def compile_layers(self) -> None:
        """Compile each block; equal blocks share one compiled graph."""
        compile_each(self.layers)

    def forward(self, latent: Tensor, mask: Mask) -> Tensor:
        """Regress the removed patches.

        Args:
            latent: [B, 1 + K, D] from the encoder, the cls token first.
            mask: what the encoder saw.

        Returns:
            Z_m [B, M, D], normalised by the last norm, LN_r, in the order of `mask.ids_mask`.
        """
        visible = latent[:, 1:]
        ids = torch.cat([mask.ids_keep, mask.ids_mask], dim=1)
        positions = self.pos_embed.to(latent.dtype).expand(len(ids), -1, -1)
        positions = gather_tokens(positions, ids, offset=1)
        x = self.mask_token.expand(*mask.ids_mask.shape, -1)
        for layer in self.layers:
            inputs = x, visible, positions
            x = recompute(layer, *inputs) if self.checkpointing else layer(*inputs)
        return self.norm(x)

    def flops(self, kept: int, removed: int) -> int:
        """Analytic FLOPs of the forward pass of one image."""
        width = self.mask_token.shape[-1]
        return len(self.layers) * cross_block_flops(removed, width, kept + removed, width, self.mlp_ratio)


class RegressorBlock(nn.Module):
    """Cross-attention from queries to the visible latents and the queries, then an MLP, both pre-norm and residual.

    Queries and keys carry positions, values do not.

    Args:
        width: token dimension.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over `width`.
        drop_path: stochastic depth rate.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float, attention: str):
        super().__init__()
        self.norm_q = LayerNorm(width)
        self.norm_k = AddLayerNorm(width)
        self.norm_v = LayerNorm(width)
        self.attn = CrossAttention(width, width, heads, attention)
        self.drop_path = DropPath(drop_path)
        self.norm2 = AddLayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), act_layer=nn.GELU, bias=True)

    def forward(self, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        """Queries x [B, M, D], visible [B, K, D], positions [B, K + M, D] of both -> [B, M, D]."""
        context = torch.cat([visible, x], dim=1)
        keys, placed = self.norm_k(context, positions)
        queries = self.norm_q(placed[:, visible.shape[1] :])
        branch = self.drop_path(self.attn(queries, keys, self.norm_v(context)))
        return add_mlp(x, branch, self.norm2, self.mlp, self.drop_path)
