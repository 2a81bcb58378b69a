"""Analytic floating-point operations; a multiply and an add count as two."""

from fastmim.config import Config

# Dense bf16 tensor-core peaks in TFLOP/s, from the makers' data sheets.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L40S": 362.0, "RTX 4090": 165.0}


def linear_flops(tokens: int, inputs: int, outputs: int) -> int:
    """A linear over `tokens` rows."""
    return 2 * tokens * inputs * outputs


def block_flops(tokens: int, width: int, mlp_ratio: float = 4.0) -> int:
    """A transformer block: qkv, scores, weighted values, projection, MLP; norms and activations not counted."""
    attention = linear_flops(tokens, width, 4 * width) + 4 * tokens * tokens * width
    return attention + 2 * linear_flops(tokens, width, int(width * mlp_ratio))


def cross_block_flops(
    queries: int, width: int, tokens: int, context_width: int, mlp_ratio: float = 4.0
) -> int:
    """A block of cross-attention and MLP: queries read tokens of another width."""
    projections = linear_flops(queries, width, 2 * width) + linear_flops(tokens, context_width, 2 * width)
    attention = 4 * queries * tokens * width
    return projections + attention + 2 * linear_flops(queries, width, int(width * mlp_ratio))


def embedding_flops(config: Config, patches: int) -> int:
    """The patch embedding of this many patches; its inputs are pixels, which need no gradient."""
    pixels = config.model.patch_size**2 * config.data.channels
    return linear_flops(patches, pixels, config.model.width)


def encoder_flops(config: Config, patches: int, tokens: int) -> int:
    """The encoder: `patches` are embedded, `tokens` go through the blocks."""
    model = config.model
    return embedding_flops(config, patches) + model.depth * block_flops(tokens, model.width, model.mlp_ratio)


def decoder_flops(config: Config, latents: int) -> int:
    """MAE's decoder of this many encoder outputs, without a head: all positions and cls go through its blocks."""
    objective, patches = config.objective, config.grid[0] * config.grid[1]
    embed = linear_flops(latents, config.model.width, objective.decoder_width)
    return embed + objective.decoder_depth * block_flops(1 + patches, objective.decoder_width)


def peak_flops(device_name: str, precision: str, given_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of a device: as given, or a known GPU's in 16 bits; None where unknown."""
    if given_tflops is not None:
        return given_tflops * 1e12
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in device_name and precision != "fp32"]
    return known[0] * 1e12 if known else None
