"""Analytic floating-point operations; a multiply and an add count as two."""

from fastmim.config import Config
from fastmim.masking import len_keep

# Dense bf16 tensor-core peaks in TFLOP/s, from the makers' data sheets.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L40S": 362.0, "RTX 4090": 165.0}


def linear_flops(tokens: int, inputs: int, outputs: int) -> int:
    """A linear over `tokens` rows."""
    return 2 * tokens * inputs * outputs


def block_flops(tokens: int, width: int, mlp_ratio: float = 4.0) -> int:
    """A transformer block: qkv, scores, weighted values, projection, MLP; norms and activations not counted."""
    attention = linear_flops(tokens, width, 4 * width) + 4 * tokens * tokens * width
    return attention + 2 * linear_flops(tokens, width, int(width * mlp_ratio))


def mae_forward_flops(config: Config) -> int:
    """One image through encoder and decoder; the last linear runs on removed patches only."""
    patches = config.grid[0] * config.grid[1]
    keep = len_keep(patches, config.mask.ratio)
    pixels = config.model.patch_size**2 * config.data.channels
    model, objective = config.model, config.objective
    encoder = linear_flops(keep, pixels, model.width)
    encoder += model.depth * block_flops(1 + keep, model.width, model.mlp_ratio)
    decoder = linear_flops(1 + keep, model.width, objective.decoder_width)
    decoder += objective.decoder_depth * block_flops(1 + patches, objective.decoder_width)
    decoder += linear_flops(patches - keep, objective.decoder_width, pixels)
    return encoder + decoder


def mae_step_flops(config: Config) -> int:
    """Forward and backward of one image.

    The backward of a linear is twice its forward, but for the patch embedding, whose inputs need no gradient.
    """
    patches = config.grid[0] * config.grid[1]
    pixels = config.model.patch_size**2 * config.data.channels
    embedding = linear_flops(len_keep(patches, config.mask.ratio), pixels, config.model.width)
    return 3 * mae_forward_flops(config) - embedding


def peak_flops(device_name: str, precision: str, given_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of a device: as given, or a known GPU's in 16 bits; None where unknown."""
    if given_tflops is not None:
        return given_tflops * 1e12
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in device_name and precision != "fp32"]
    return known[0] * 1e12 if known else None
