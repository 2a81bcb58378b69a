"""The one place that chooses how attention is computed."""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.errors import ConfigError

logger = logging.getLogger("fastmim")


@functools.cache
def choose_attention(wanted: str, device_type: str) -> str:
    """Resolve `train.attention` for a device; the choice is logged once.

    Args:
        wanted: auto, xformers or sdpa. auto is xformers on CUDA where it imports, sdpa elsewhere.
        device_type: cuda or cpu.

    Raises:
        ConfigError: xformers was asked for where it cannot run.
    """
    if wanted == "sdpa":
        chosen, why = "sdpa", "asked for"
    elif device_type != "cuda":
        if wanted == "xformers":
            raise ConfigError(
                f"train.attention='xformers' on {device_type}: it runs on CUDA only; expected auto or sdpa"
            )
        chosen, why = "sdpa", f"xformers has no {device_type} operator"
    else:
        try:
            import xformers.ops  # noqa: F401 (heavy, and needed on CUDA only)
        except ImportError as error:
            if wanted == "xformers":
                raise ConfigError(f"train.attention='xformers': it does not import ({error})") from None
            chosen, why = "sdpa", f"xformers does not import ({error})"
        else:
            chosen, why = "xformers", "asked for" if wanted == "xformers" else "on CUDA"
    logger.info("attention: %s (%s)", chosen, why)
    return chosen


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names and either backend.

    Args:
        dim: token dimension.
        num_heads: heads; divides `dim`.
        qkv_bias, proj_bias: whether the linears have biases.
        backend: "sdpa" or "xformers", from `choose_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        backend: str = "sdpa",
        **_timm_options,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among all tokens of a sample. x [B, N, D] -> [B, N, D]; the mask arguments are timm's."""
        assert attn_mask is None and not is_causal, "masked-image encoders attend among all tokens they hold"
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        if self.backend == "xformers":
            x = _xformers_attention(*qkv.unbind(2))
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, D / heads]
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(batch, tokens, dim))


@torch.compiler.disable
def _xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, heads, D / heads] each -> the same."""
    from xformers.ops import memory_efficient_attention  # heavy, and needed on CUDA only

    return memory_efficient_attention(q, k, v)
