"""DeepSpeed: joining the ranks, reading its configuration, and building the engine of a run."""

import os
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import nn

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.optim import GuardedAdamW, parameter_groups
from fastmim.ranks import Ranks, cores_per_rank


def deepspeed_config(config: Config, precision: str, micro_batch: int) -> dict[str, Any]:
    """The `deepspeed:` fragment of a recipe, completed with the keys that this configuration owns."""
    owned: dict[str, Any] = {
        "train_batch_size": config.optim.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.optim.accumulation,
        "steps_per_print": 10**9,  # this engine logs itself
        "gradient_clipping": config.optim.clip_grad or 0.0,  # left out, DeepSpeed clips to a norm of 1
    }
    if precision in ("bf16", "fp16"):
        owned[precision] = {"enabled": True}
    return {**config.deepspeed, **owned}


def check_fragment(config: Config, precision: str, micro_batch: int) -> None:
    """Let DeepSpeed read its own sections before anything is built; what it raises becomes one line."""
    try:
        DeepSpeedConfig(deepspeed_config(config, precision, micro_batch))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"deepspeed: {error.title}: {key}={first['input']!r}: {first['msg']}") from None
    except Exception as error:  # DeepSpeed raises a type of its own for each section
        raise ConfigError(f"deepspeed: {config.deepspeed} was refused: {error}") from None


def start_distributed(ranks: Ranks) -> None:
    """Join the ranks of the run: nccl on GPUs, gloo on CPUs."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_PORT", "0")
    # DeepSpeed would compile an operator for ranks that share a CPU. Training does not get faster by it, and it
    # would need a compiler, a lock that a killed run leaves behind, and a path without spaces.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
    ranks.open_host_group()
    if ranks.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_per_rank())


def build_engine(
    config: Config, objective: nn.Module, precision: str, micro_batch: int
) -> deepspeed.DeepSpeedEngine:
    """The engine that computes, reduces and applies gradients, with its optimiser.

    Args:
        config: of the run.
        objective: what is trained.
        precision: bf16, fp16 or fp32.
        micro_batch: images per rank and backward pass.
    """
    completed = deepspeed_config(config, precision, micro_batch)
    groups = parameter_groups(objective, config.optim.weight_decay)
    options: dict[str, Any] = {"lr": config.optim.lr, "betas": config.optim.betas, "eps": config.optim.eps}
    zero = config.deepspeed.get("zero_optimization", {})
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles itself, so only where it is asked for

        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    elif config.zero_stage == 0 and precision == "fp32":
        optimizer = GuardedAdamW(groups, config.optim.clip_grad, **options)
        completed["gradient_clipping"] = 0.0
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    return deepspeed.initialize(model=objective, optimizer=optimizer, config=completed)[0]
