"""Fused operations of masked-image pre-training, each with its plain-PyTorch reference beside it.

The operations are registered with PyTorch under `fastmim::`, differentiable where that has a meaning, and
work under `torch.compile(fullgraph=True)`. They import nothing of fastmim: torch and triton are enough.
`_dispatch` describes FASTMIM_KERNELS, which chooses between Triton kernels and plain PyTorch.
"""

# By full name: transformers probes for another package called `kernels` by importing it, finds this folder where
# the repository's root is on the path, and would register every operation a second time.
from fastmim.kernels.gather_patches import gather_patches, gather_patches_reference
from fastmim.kernels.gather_tokens import gather_tokens, gather_tokens_reference
from fastmim.kernels.masked_pixel_loss import masked_pixel_loss, masked_pixel_loss_reference
from fastmim.kernels.unshuffle import unshuffle, unshuffle_reference

__all__ = [
    "gather_patches",
    "gather_patches_reference",
    "gather_tokens",
    "gather_tokens_reference",
    "masked_pixel_loss",
    "masked_pixel_loss_reference",
    "unshuffle",
    "unshuffle_reference",
]
