"""The number format of a run."""

import logging

import torch

from fastmim.errors import ConfigError
from fastmim.wide_products import widen_products

logger = logging.getLogger("fastmim")


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolve `train.precision`: auto is bf16 where the hardware computes it, else fp32.

    Where bf16 is asked for and a CPU has none, this process multiplies its matrices in float32 from then on; a GPU's
    emulation is warned of.

    Raises:
        ConfigError: a format that the device does not compute.
    """
    if device.type == "cuda":
        has_bf16, has_fp16 = torch.cuda.is_bf16_supported(including_emulation=False), True
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        has_fp16 = torch.cpu._is_amx_fp16_supported()
    if wanted == "auto":
        return "bf16" if has_bf16 else "fp32"
    if wanted == "fp16" and not has_fp16:
        raise ConfigError(
            f"train.precision='fp16': this {device.type} does not compute it; expected bf16 or fp32"
        )
    if wanted == "bf16" and not has_bf16 and device.type == "cpu":
        widen_products()
        logger.info(
            "precision=bf16: this cpu has none and multiplies in float32, no faster than precision=fp32"
        )
    elif wanted == "bf16" and not has_bf16:
        logger.warning(
            "precision=bf16: this %s emulates it, more slowly than float32; auto takes what the hardware computes",
            device.type,
        )
    return wanted
