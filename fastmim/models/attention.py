"""The one place that chooses how attention is computed."""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.errors import ConfigError
from fastmim.kernels import short_attention
from fastmim.kernels.short_attention import MAX_HEAD, MAX_TOKENS
from fastmim.models.matmul_attention import matmul_attention, matmul_self_attention

logger = logging.getLogger("fastmim")


@functools.cache
def choose_attention(wanted: str, device_type: str, precision: str = "fp32") -> str:
    """Resolve `train.attention`; the choice is logged once.

    Args:
        wanted: auto, xformers, sdpa, short or matmul. In 16 bits auto is short on CUDA and matmul on a CPU (bf16);
            elsewhere it is sdpa.
        device_type: cuda or cpu.
        precision: bf16, fp16 or fp32.

    Raises:
        ConfigError: xformers or short was asked for where it cannot run.
    """
    chosen, why = wanted, "asked for"
    if wanted == "short" and (device_type != "cuda" or precision == "fp32"):
        raise ConfigError(
            f"train.attention='short' in {precision} on {device_type}: it runs on CUDA in bf16 and fp16 only; expected "
            "auto, sdpa or matmul"
        )
    if wanted == "xformers" and device_type != "cuda":
        raise ConfigError(
            f"train.attention='xformers' on {device_type}: it runs on CUDA only; expected auto, sdpa or matmul"
        )
    if wanted == "xformers" and (refusal := xformers_refusal(precision)):
        raise ConfigError(f"train.attention='xformers': {refusal}; expected auto or sdpa")
    if wanted == "auto" and device_type == "cpu" and precision == "bf16":
        # PyTorch's fused CPU kernel computes bf16 gradients several times slower than plain products of a few images
        # do (benchmarks/attention.py).
        chosen, why = "matmul", "faster than sdpa in bf16 on a CPU"
    elif wanted == "auto" and device_type == "cuda" and precision != "fp32":
        # PyTorch's fused kernels take 2.9 times as long for the 50 tokens that MAE's encoder sees (H200).
        chosen, why = "short", f"a kernel for up to {MAX_TOKENS} tokens, sdpa for more"
    elif wanted == "auto":
        chosen, why = "sdpa", "PyTorch's own"
    logger.info("attention: %s (%s)", chosen, why)
    return chosen


def xformers_refusal(precision: str) -> str | None:
    """Why xformers cannot train on the current CUDA device, or None if it can: it is tried on a few tokens.

    A wheel imports, but has no operator, where it was built for another CUDA than the one PyTorch brings.
    """
    try:
        from xformers.ops import memory_efficient_attention  # heavy, and needed on CUDA only
    except ImportError as error:
        return f"xformers does not import ({error})"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.enable_grad():
        tokens = torch.zeros(1, 8, 1, 64, dtype=dtype, device="cuda", requires_grad=True)
        try:
            memory_efficient_attention(tokens, tokens, tokens).sum().backward()
        except NotImplementedError:
            return f"xformers has no {precision} operator here, `python -m xformers.info` tells why"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over all tokens, by `backend`; q, k, v and the result are [B, N, heads, d].

    `short` is for what `self_attend` is given, and PyTorch's here.
    """
    if backend == "xformers":
        return _xformers_attention(q, k, v)
    if backend == "matmul":
        return matmul_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def self_attend(qkv: Tensor, backend: str) -> Tensor:
    """As `attend`, of queries, keys and values in one tensor [B, N, 3, heads, d]."""
    if backend == "short" and qkv.shape[1] <= MAX_TOKENS and qkv.shape[4] <= MAX_HEAD:
        return short_attention(qkv)
    return matmul_self_attention(qkv) if backend == "matmul" else attend(*qkv.unbind(2), backend)


@torch.compiler.disable
def _xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # heavy, and needed on CUDA only

    return memory_efficient_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names and any backend.

    Args:
        dim: token dimension.
        num_heads: heads; divides `dim`.
        qkv_bias, proj_bias: whether the linears have biases.
        backend: xformers, sdpa, short or matmul, from `choose_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        backend: str = "sdpa",
        **timm_options,
    ):
        super().__init__()
        # timm's block passes every option of its own attention; those that are off need nothing.
        active = [name for name, value in timm_options.items() if value and name != "norm_layer"]
        assert not active, f"options that this attention does not have: {active}"
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among all tokens of a sample. x [B, N, D] -> [B, N, D]."""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """Between the linears: queries, keys and values [B, N, 3 D], as `qkv` gives them -> [B, N, D]."""
        batch, tokens, width = qkv.shape
        qkv = qkv.view(batch, tokens, 3, self.num_heads, -1)
        return self_attend(qkv, self.backend).reshape(batch, tokens, width // 3)
