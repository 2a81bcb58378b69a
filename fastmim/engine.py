"""DeepSpeed: joining the ranks, reading its configuration, and building the engine of a run."""

import os
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import nn

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.optim import GuardedAdamW, MasterAdamW, parameter_groups
from fastmim.ranks import Ranks, cores_per_rank

_BUCKET_SIZE = 500_000_000


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

    On one rank, stages 1 and 2 of ZeRO would shard nothing: unless they offload, the engine steps without them.

    Args:
        config: of the run.
        objective: what is trained; its parameters take the precision.
        precision: bf16, fp16 or fp32.
        micro_batch: images per rank and backward pass.
    """
    completed = deepspeed_config(config, precision, micro_batch)
    zero = config.deepspeed.get("zero_optimization", {})
    alone = dist.get_world_size() == 1 and config.zero_stage < 3 and not _offloads(zero, "optimizer")
    # DeepSpeed's own 16-bit optimisers without ZeRO count a step more than they made, so they are not used for bf16.
    guarded = (alone or config.zero_stage == 0) and precision != "fp16"
    groups = parameter_groups(objective, config.optim.weight_decay)
    options: dict[str, Any] = {"lr": config.optim.lr, "betas": config.optim.betas, "eps": config.optim.eps}
    if guarded and precision == "bf16":
        for parameter in objective.parameters():
            parameter.data = parameter.data.bfloat16()
        optimizer = MasterAdamW(groups, config.optim.clip_grad, **options)
        del completed["bf16"]
    elif guarded:
        optimizer = GuardedAdamW(groups, config.optim.clip_grad, **options)
    elif _offloads(zero, "optimizer"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles itself, so only where it is asked for

        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    if guarded:
        completed["gradient_clipping"] = 0.0  # it clips
        completed.pop("zero_optimization", None)
    elif config.zero_stage:
        completed["zero_optimization"] = {"reduce_bucket_size": _bucket_size(objective), **zero}
    engine = deepspeed.initialize(model=objective, optimizer=optimizer, config=completed)[0]
    if guarded and alone:
        engine.enable_backward_allreduce = False
    elif precision == "fp16" and config.zero_stage == 0:
        # It makes a step without gradients to allocate its state, which Adam's bias correction must not count. (That
        # decays the weights by one step, which is nothing beside the thousands that follow.)
        for state in optimizer.state.values():
            state["step"].zero_()
    return engine


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"


def _bucket_size(objective: nn.Module) -> int:
    """Elements of ZeRO's buckets, which it allocates whole in every step: DeepSpeed's default, or all there are."""
    return min(_BUCKET_SIZE, sum(p.numel() for p in objective.parameters()))
