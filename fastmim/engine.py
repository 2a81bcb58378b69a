"""DeepSpeed: joining the ranks, reading its configuration, and building the engine of a run."""

import os
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn

from fastmim.config import Config
from fastmim.deepspeed_fragment import (
    bucket_settings,
    offloads_optimizer,
    stage_in_effect,
    sum_dtype,
    sums_in_place,
)
from fastmim.errors import ConfigError
from fastmim.heap import give_heap_back, keep_heap
from fastmim.optim import GuardedAdamW, parameter_groups
from fastmim.ranks import Ranks, cores_per_rank
from fastmim.split_adamw import SplitAdamW


def deepspeed_config(config: Config, precision: str, micro_batch: int) -> dict[str, Any]:
    """The `deepspeed:` fragment of a recipe, completed with the keys that this configuration owns."""
    owned: dict[str, Any] = {
        "train_batch_size": config.optim.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.optim.accumulation,
        "steps_per_print": 10**9,  # this engine logs itself
        # DeepSpeed's own timer, of which nobody reads, waits for the device before and after every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "gradient_clipping": config.optim.clip_grad or 0.0,  # left out, DeepSpeed clips to a norm of 1
    }
    if precision in ("bf16", "fp16"):
        owned[precision] = {"enabled": True}
    return {**config.deepspeed, **owned}


def check_fragment(config: Config, precision: str, micro_batch: int) -> None:
    """Let DeepSpeed read its own sections before anything is built; what it raises becomes one line."""
    world_size = config.optim.batch_size // (micro_batch * config.optim.accumulation)
    if precision == "fp16" and config.zero_stage == 0:
        raise ConfigError(
            "deepspeed.zero_optimization.stage=0 with fp16, whose loss DeepSpeed scales under ZeRO only; expected "
            "stage 1, 2 or 3"
        )
    wanted = sum_dtype(config.deepspeed)
    whole = stage_in_effect(config.deepspeed, precision, world_size) == 0
    if whole and precision == "bf16" and world_size > 1 and wanted not in (None, "bf16"):
        raise ConfigError(
            f"deepspeed.data_types.grad_accum_dtype={wanted!r} with deepspeed.zero_optimization.stage=0 on "
            f"{world_size} ranks, which sum in bf16; expected stage 1, 2 or 3"
        )
    summed = dict.fromkeys(("fp32", precision))
    if wanted not in (None, *summed):
        raise ConfigError(
            f"deepspeed.data_types.grad_accum_dtype={wanted!r} with precision {precision}; expected "
            f"{' or '.join(summed)}"
        )
    try:
        DeepSpeedConfig(deepspeed_config(config, precision, micro_batch))
    except ValidationError as error:
        first, of_zero = error.errors()[0], error.title == DeepSpeedZeroConfig.__name__
        section = "zero_optimization" if of_zero else error.title
        key, why = ".".join(map(str, ("deepspeed", section, *first["loc"]))), first["msg"]
        if of_zero and first["type"] == "extra_forbidden":
            why = f"unknown key; expected one of {', '.join(DeepSpeedZeroConfig.model_fields)}"
        raise ConfigError(f"{key}={first['input']!r}: {why}") from None
    except Exception as error:  # DeepSpeed raises a type of its own for each section
        raise ConfigError(f"deepspeed: {config.deepspeed} was refused: {error}") from None


def start_distributed(ranks: Ranks) -> None:
    """Join the ranks of the run: nccl on GPUs, gloo on CPUs, where memory is kept from step to step."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_PORT", "0")
    # DeepSpeed would compile an operator for ranks that share a CPU. Training does not get faster by it, and it
    # would need a compiler, a lock that a killed run leaves behind, and a path without spaces.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        keep_heap()
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
        objective: what is trained; its parameters take the precision.
        precision: bf16, fp16 or fp32.
        micro_batch: images per rank and backward pass.
    """
    completed = deepspeed_config(config, precision, micro_batch)
    groups = parameter_groups(objective, config.optim.weight_decay)
    options: dict[str, Any] = {"lr": config.optim.lr, "betas": config.optim.betas, "eps": config.optim.eps}
    world_size = dist.get_world_size()
    stage = stage_in_effect(config.deepspeed, precision, world_size)
    on_cpu = Ranks().device.type == "cpu"
    sizes = [parameter.numel() for parameter in objective.parameters()]
    summing = bucket_settings(stage, sizes, world_size, on_cpu) | completed.get("zero_optimization", {})
    # DeepSpeed's own 16-bit optimiser without ZeRO counts a step more than it made, and its plain path lets bad
    # gradients through.
    if stage == 0:
        # Where the optimiser's state belongs; ZeRO makes its own, after DeepSpeed has moved the parameters.
        objective.to(Ranks().device)
        completed["gradient_clipping"] = 0.0  # the optimiser clips
        for key in ("zero_optimization", "bf16", "data_types"):
            completed.pop(key, None)
    else:
        completed["zero_optimization"] = summing
        if sums_in_place(config.deepspeed, stage):
            summing["reduce_scatter"] = False
            completed["prescale_gradients"] = True  # as with it: fp16 might not hold a sum of gradients
    alone = world_size == 1
    if stage == 0 and precision == "bf16":
        # DeepSpeed, which is not told of bf16 here, would send float32.
        completed.setdefault("communication_data_type", "bf16")
        for parameter in objective.parameters():
            parameter.data = parameter.data.bfloat16()
        several = alone and config.optim.accumulation > 1 and sum_dtype(config.deepspeed) != "bf16"
        optimizer = SplitAdamW(groups, config.optim.clip_grad, sum_in_float32=several, **options)
    elif stage == 0:
        optimizer = GuardedAdamW(groups, config.optim.clip_grad, **options)
    elif offloads_optimizer(config.deepspeed):
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles itself, so only where it is asked for

        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    engine = deepspeed.initialize(model=objective, optimizer=optimizer, config=completed)[0]
    if stage == 0:
        # DeepSpeed's goes through the names of every module in every step.
        engine.zero_grad = optimizer.zero_grad
        # Without ZeRO it does not ask for the size of a bucket.
        bucket = int(summing["reduce_bucket_size"])
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=bucket)
    if stage == 0 and alone:
        engine.enable_backward_allreduce = False
    if on_cpu:
        give_heap_back()  # what made the weights, and held them in float32
        _give_heap_back_after_first_step(optimizer)
    return engine


def _give_heap_back_after_first_step(optimizer: torch.optim.Optimizer) -> None:
    """Return the pages of what the first step freed.

    Among it lies what that step was the first to ask for and keeps: shared results, PyTorch's prepared products. Later
    steps find other places between them, and the first one's pages would stay.
    """
    once = [give_heap_back]

    def after(*_: object) -> None:
        if once:
            once.pop()()

    optimizer.register_step_post_hook(after)
