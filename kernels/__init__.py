"""Fused operations of masked-image pre-training, each with its plain-PyTorch reference beside it.

The operations are registered with PyTorch under `fastmim::`, differentiable where that has a meaning, and
work under `torch.compile(fullgraph=True)`. They import nothing of fastmim: torch and triton are enough.
`_dispatch` describes FASTMIM_KERNELS, which chooses between Triton kernels, plain PyTorch and C (`_native`).
"""

# By full name: transformers probes for another package called `kernels` by importing it, finds this folder where
# the repository's root is on the path, and would register every operation a second time.
from fastmim.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from fastmim.kernels.align import (
    cosine_align,
    cosine_align_reference,
    mse_align,
    mse_align_reference,
)
from fastmim.kernels.bias_gelu import bias_gelu, bias_gelu_reference
from fastmim.kernels.embed_tokens import embed_tokens, embed_tokens_reference
from fastmim.kernels.gather_patches import gather_patches, gather_patches_reference
from fastmim.kernels.gather_tokens import (
    gather_tokens,
    gather_tokens_reference,
    scatter_tokens,
    scatter_tokens_reference,
)
from fastmim.kernels.info_nce import info_nce, info_nce_reference
from fastmim.kernels.masked_cross_entropy import masked_cross_entropy, masked_cross_entropy_reference
from fastmim.kernels.masked_pixel_loss import masked_pixel_loss, masked_pixel_loss_reference
from fastmim.kernels.sample_block_mask import sample_block_mask, sample_block_mask_reference
from fastmim.kernels.sample_grid_mask import sample_grid_mask, sample_grid_mask_reference
from fastmim.kernels.sample_mask import sample_random_mask, sample_random_mask_reference
from fastmim.kernels.short_attention import short_attention, short_attention_reference
from fastmim.kernels.unshuffle import unshuffle, unshuffle_reference

__all__ = [
    "add_layer_norm",
    "add_layer_norm_reference",
    "bias_gelu",
    "bias_gelu_reference",
    "cosine_align",
    "cosine_align_reference",
    "embed_tokens",
    "embed_tokens_reference",
    "gather_patches",
    "gather_patches_reference",
    "gather_tokens",
    "gather_tokens_reference",
    "info_nce",
    "info_nce_reference",
    "masked_cross_entropy",
    "masked_cross_entropy_reference",
    "masked_pixel_loss",
    "masked_pixel_loss_reference",
    "mse_align",
    "mse_align_reference",
    "sample_block_mask",
    "sample_block_mask_reference",
    "sample_grid_mask",
    "sample_grid_mask_reference",
    "sample_random_mask",
    "sample_random_mask_reference",
    "scatter_tokens",
    "scatter_tokens_reference",
    "short_attention",
    "short_attention_reference",
    "unshuffle",
    "unshuffle_reference",
]
