"""Transformer blocks, from timm, with this engine's attention; and their initialisation."""

from functools import partial, partialmethod

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmim.models.attention import Attention

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Blocks(nn.Module):
    """A stack of pre-norm transformer blocks.

    Args:
        width: token dimension.
        depth: number of blocks.
        heads: attention heads per block.
        mlp_ratio: hidden width of the MLP over `width`.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.
        attention: backend, from `choose_attention`.
        checkpointing: recompute each block in the backward pass instead of storing it.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        attention: str = "sdpa",
        checkpointing: bool = False,
    ):
        super().__init__()
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.checkpointing = checkpointing
        self.layers = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio,
                qkv_bias=True,
                drop_path=rate,
                norm_layer=LayerNorm,
                attn_layer=_attention_class(attention),
            )
            for rate in rates
        )

    def compile_layers(self) -> None:
        """Compile each block; equal blocks share one compiled graph."""
        for layer in self.layers:
            layer.compile()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


def _attention_class(backend: str) -> type[Attention]:
    # timm asks for a class and checks it with issubclass, so a partial will not do.
    return type("Attention", (Attention,), {"__init__": partialmethod(Attention.__init__, backend=backend)})


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linears with zero biases, unit LayerNorms (MAE, appendix A.1); for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
