"""The number format of a run, and DeepSpeed's configuration for it."""

from typing import Any

import torch

from fastmim.config import Config
from fastmim.errors import ConfigError


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolve `train.precision`: auto is bf16 where the hardware computes it, else fp32.

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
    return wanted


def deepspeed_config(config: Config, precision: str, micro_batch: int) -> dict[str, Any]:
    """The `deepspeed:` fragment of a recipe, completed with the keys that this configuration owns."""
    owned: dict[str, Any] = {
        "train_batch_size": config.optim.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.optim.accumulation,
        "steps_per_print": 10**9,  # this engine logs itself
    }
    if config.optim.clip_grad is not None:
        owned["gradient_clipping"] = config.optim.clip_grad
    if precision in ("bf16", "fp16"):
        owned[precision] = {"enabled": True}
    return {**config.deepspeed, **owned}
