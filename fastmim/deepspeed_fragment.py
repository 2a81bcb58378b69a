"""What a recipe's `deepspeed:` fragment may hold, checked without importing DeepSpeed."""

import difflib
from typing import Any

# DeepSpeed ignores an unknown top-level key silently, so the accepted ones are listed here.
KEYS = {
    "aio",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
OWNED = {
    "train_batch_size": "optim.batch_size",
    "train_micro_batch_size_per_gpu": "optim.batch_size and optim.accumulation",
    "gradient_accumulation_steps": "optim.accumulation",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "checkpoint",
    "compile": "train.compile",
    "steps_per_print": "log.every_steps",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
}

BUCKET_SIZE = 500_000_000
"""DeepSpeed's default of `reduce_bucket_size`, in numbers."""

COPIED_BUCKET = 5_000_000
"""Numbers that CPUs sum at once without ZeRO, whose buffer is new in every step: mostly one that glibc's heap keeps."""

OVERLAPPED_BUCKET = 50_000_000
"""Numbers of a bucket that is summed during the backward pass: several of a ViT-L, each large enough for a network."""


def offloads_optimizer(fragment: dict[str, Any]) -> bool:
    """Whether the optimiser's state is kept off the device."""
    offload = fragment.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def stage_in_effect(fragment: dict[str, Any], precision: str, world_size: int) -> int:
    """The stage of ZeRO that a run is computed by.

    One rank shards nothing at stages 1 and 2, so it goes without them, but for what they alone do: to offload the
    optimiser, and to scale the loss of fp16.
    """
    stage = fragment.get("zero_optimization", {}).get("stage", 0)
    alone = world_size == 1 and stage < 3 and precision != "fp16" and not offloads_optimizer(fragment)
    return 0 if alone else stage


def sum_dtype(fragment: dict[str, Any]) -> str | None:
    """What the gradients of several backward passes are asked to be summed in."""
    return (fragment.get("data_types") or {}).get("grad_accum_dtype")


def bucket_settings(stage: int, sizes: list[int], world_size: int, on_cpu: bool) -> dict[str, Any]:
    """How gradients are summed over the ranks, unless the fragment says it.

    DeepSpeed allocates a bucket whole in every step, and sums it when it is full. On GPUs buckets fill, and are summed,
    while the backward pass goes on; on CPUs, whose cores do both, all gradients are summed at once. Without ZeRO
    gradients are copied to a bucket after that pass, and back.

    Args:
        stage: of ZeRO, in effect.
        sizes: numbers of each parameter.
        world_size: of the run.
        on_cpu: where the ranks compute.
    """
    if stage == 0:
        return {"reduce_bucket_size": COPIED_BUCKET if on_cpu else OVERLAPPED_BUCKET}
    if on_cpu or world_size == 1:
        return {"reduce_bucket_size": min(BUCKET_SIZE, sum(sizes))}
    return {"overlap_comm": True, "reduce_bucket_size": min(sum(sizes), max(OVERLAPPED_BUCKET, *sizes))}


def sums_in_place(fragment: dict[str, Any], stage: int) -> bool:
    """Whether a bucket of ZeRO 1 or 2 is to be summed where it lies.

    DeepSpeed's default, `reduce_scatter`, sends every rank a whole bucket just the same, but a copy of it, of which it
    copies a share back. It stays where gradients are added in another dtype than sent, as the mean would be rounded
    elsewhere, and where the fragment says how gradients are summed.
    """
    zero = fragment.get("zero_optimization", {})
    told = {"prescale_gradients", "gradient_predivide_factor", "communication_data_type"} & fragment.keys()
    told |= {"reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"} & zero.keys()
    return stage in (1, 2) and not told and sum_dtype(fragment) is None


def check_fragment(fragment: dict[str, Any]) -> None:
    """Refuse what this configuration sets itself, and what DeepSpeed would ignore.

    Raises:
        ValueError: names the key and what is accepted.
    """
    for key in fragment:
        if key in OWNED:
            raise ValueError(f"deepspeed.{key} is set by {OWNED[key]}; set it there")
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean deepspeed.{close[0]}? " if close else ""
            raise ValueError(f"deepspeed.{key}: unknown key; {hint}expected one of {', '.join(sorted(KEYS))}")
    zero = fragment.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"deepspeed.zero_optimization={zero!r}; expected a mapping such as {{stage: 2}}")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_optimization.stage={stage!r}; expected 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key) or {}, dict):
            raise ValueError(
                f"deepspeed.zero_optimization.{key}={zero[key]!r}; expected a mapping such as {{device: cpu}}"
            )
    if stage == 0 and offloads_optimizer(fragment):
        raise ValueError(
            "deepspeed.zero_optimization.offload_optimizer without ZeRO; "
            "expected deepspeed.zero_optimization.stage=1, 2 or 3"
        )
