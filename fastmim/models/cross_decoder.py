"""A decoder of cross-attention only: Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", TMLR 2025."""

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.kernels import gather_tokens
from fastmim.models.blocks import MLP, AddLayerNorm, LayerNorm, add_mlp, compile_each, init_weights
from fastmim.models.cross_attention import CrossAttention
from fastmim.models.position import sincos_positions
from fastmim.models.recompute import recompute


class CrossDecoder(nn.Module):
    """Removed positions read the encoder's tokens and never each other.

    Each block reads a learned mix of the encoder's layers, its input among them, as in the authors' published runs.
    The encoder's last norm has no part in it and stays as it began. As positions do not see each other, any part
    of the removed patches can be decoded alone, at a cost in proportion.

    Args:
        config: of the run; `objective`, `model`, `data` and `train` are read.
        attention: backend, from `choose_attention`.
    """

    pos_embed: Tensor

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__()
        objective, model = config.objective, config.model
        width = objective.decoder_width
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        table = sincos_positions(width, config.grid, config.positions_grid)
        self.register_buffer("pos_embed", table, persistent=False)
        self.mix = LayerMix(1 + model.depth, objective.decoder_depth)
        self.layers = nn.ModuleList(
            CrossBlock(width, model.width, objective.decoder_heads, attention)
            for _ in range(objective.decoder_depth)
        )
        self.norm = LayerNorm(width)
        self.checkpointing = config.train.activation_checkpointing
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def compile_layers(self) -> None:
        """Compile each block; equal blocks share one compiled graph."""
        compile_each(self.layers)

    def forward(self, layers: list[Tensor], ids: Tensor) -> Tensor:
        """Features of patches, for a head.

        Args:
            layers: input of the encoder's first block and output of each, [B, 1 + K, D] each.
            ids: int64 [B, M], the positions to decode.

        Returns:
            [B, M, decoder width].
        """
        positions = self.pos_embed.to(self.mask_token.dtype).expand(len(ids), -1, -1)
        x = gather_tokens(positions, ids, offset=1) + self.mask_token
        for layer, context in zip(self.layers, self.mix(layers), strict=True):
            x = recompute(layer, x, context) if self.checkpointing else layer(x, context)
        return self.norm(x)


class LayerMix(nn.Module):
    """A learned linear mix of layers for each reader.

    Args:
        layers: how many are mixed.
        readers: how many mixes are made.
    """

    def __init__(self, layers: int, readers: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(readers, layers) / layers**0.5)

    def forward(self, layers: list[Tensor]) -> Tensor:
        """Tensors of one shape [...] -> [readers, ...]."""
        return torch.tensordot(self.weight, torch.stack(layers), dims=1)


class CrossBlock(nn.Module):
    """Cross-attention, then an MLP, both pre-norm and residual.

    Args:
        width: of the queries.
        context_width: of the tokens that are read.
        heads: attention heads.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, width: int, context_width: int, heads: int, attention: str):
        super().__init__()
        self.norm_context = LayerNorm(context_width)
        self.norm1 = LayerNorm(width)
        self.attn = CrossAttention(width, context_width, heads, attention)
        self.norm2 = AddLayerNorm(width)
        self.mlp = MLP(width, 4 * width, act_layer=nn.GELU, bias=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, M, width], context [B, T, context_width] -> [B, M, width]."""
        context = self.norm_context(context)
        branch = self.attn(self.norm1(x), context, context)
        return add_mlp(x, branch, self.norm2, self.mlp, nn.Identity())
