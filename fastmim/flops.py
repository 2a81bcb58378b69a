"""Analytic floating-point operations, where a multiply and an add count as two, and how many a device can do."""

import time
from typing import NamedTuple

import torch

from fastmim.config import Config

# Dense bf16 tensor-core peaks in TFLOP/s, from the makers' data sheets; the first name that a device has counts.
PEAK_TFLOPS = {
    **{"H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0},
    **{"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L40S": 362.0, "RTX 4090": 165.0},
}

_PEAK_SIDE = {"cuda": 8192, "cpu": 2048}
_PEAK_REPEATS = 10


class Flops(NamedTuple):
    """FLOPs of the two passes of a module, for one image.

    Attributes:
        forward: of its matrix products.
        backward: of those that make their gradients.
    """

    forward: int
    backward: int

    @classmethod
    def of(cls, forward: int, gradients: int = 2) -> "Flops":
        """Of products with this many gradients each, which cost as much: for both factors, for one, or for none."""
        return cls(forward, gradients * forward)


def add_modules(*parts: dict[str, Flops]) -> dict[str, Flops]:
    """The sum of FLOPs by module; a module that is used twice stands in two parts."""
    total: dict[str, Flops] = {}
    for name, flops in (item for part in parts for item in part.items()):
        forward, backward = total.get(name, Flops(0, 0))
        total[name] = Flops(forward + flops.forward, backward + flops.backward)
    return total


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


def encoder_modules(config: Config, patches: int, tokens: int, learned: bool = True) -> dict[str, Flops]:
    """The encoder: `patches` are embedded, `tokens` go through the blocks; no gradients unless `learned`."""
    model = config.model
    blocks = model.depth * block_flops(tokens, model.width, model.mlp_ratio)
    embedding = Flops.of(embedding_flops(config, patches), gradients=1 if learned else 0)
    return {"patch_embed": embedding, "encoder": Flops.of(blocks, gradients=2 if learned else 0)}


def decoder_flops(config: Config, latents: int, asked: int) -> int:
    """MAE's decoder of this many encoder outputs, without a head.

    All positions and cls go through its blocks, but for the last one's MLP, which sees the patches that are asked for.
    """
    objective, left_out = config.objective, 1 + config.grid[0] * config.grid[1] - asked
    width = objective.decoder_width
    embed = linear_flops(latents, config.model.width, width)
    blocks = objective.decoder_depth * block_flops(asked + left_out, width)
    return embed + blocks - 2 * linear_flops(left_out, width, 4 * width)


def peak_flops(device_name: str, precision: str, given_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of a device: as given, or a known GPU's in 16 bits; None where unknown."""
    if given_tflops is not None:
        return given_tflops * 1e12
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in device_name and precision != "fp32"]
    return known[0] * 1e12 if known else None


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the fastest of several: what a step's FLOP/s are compared with.

    Args:
        device: CPU or CUDA; it should have nothing else to do.
        dtype: of the factors.
    """
    side = _PEAK_SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)  # chooses the kernel
    return linear_flops(side, side, side) / min(
        _seconds_of_product(left, right, out) for _ in range(_PEAK_REPEATS)
    )


def _seconds_of_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    if left.device.type == "cpu":
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.mm(left, right, out=out)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
