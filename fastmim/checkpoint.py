"""Saving a run on all ranks and taking it up again, through DeepSpeed's files inside our own directory."""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmim import manifest as manifests
from fastmim.config import Config
from fastmim.ema import EMA
from fastmim.errors import CheckpointError, TrainingAborted
from fastmim.halves import Master
from fastmim.manifest import EMA_WEIGHTS, WEIGHTS
from fastmim.provenance import source_commit
from fastmim.ranks import Ranks
from fastmim.split_adamw import SplitAdamW

_TAG = "deepspeed"
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
"""What torch.save's errors of a full disk name; they are RuntimeErrors, as many others are."""

# What may change between a run and its continuation: where things lie, how often it tells and saves, and how
# fast it computes the same mathematics. Everything else is refused.
FREE_KEYS = (
    "output",
    "log",
    "checkpoint",
    "model.init",  # read when a run starts, and not again
    "data.source",
    "target.teacher",  # compared by its weights, as the tokenizer is
    "target.teacher_weights",
    "target.tokenizer",  # its weights are compared
    "data.threads",
    "data.prefetch",
    "data.max_bad_fraction",
    "data.max_pixels",
    "data.max_file_bytes",
    "train.attention",
    "train.compile",
    "train.activation_checkpointing",
    "train.max_skipped_in_a_row",
    "train.max_steps",
    "train.profile",
    "train.peak_tflops",
    "train.precision",  # compared as it was resolved
    "deepspeed.comms_logger",
    "deepspeed.dump_state",
    "deepspeed.flops_profiler",
    "deepspeed.memory_breakdown",
    "deepspeed.wall_clock_breakdown",
    "deepspeed.zero_optimization.stage",  # compared with its default
)


def save(
    engine: DeepSpeedEngine,
    ranks: Ranks,
    config: Config,
    precision: str,
    step: int,
    state: dict[str, Any],
    ema: EMA | None = None,
) -> Path:
    """Write the checkpoint of `step`; all ranks call it. Killed at any moment, it leaves the previous one whole.

    Args:
        engine: of the run.
        ranks: of the run.
        config: of the run; stored, and compared when the run is taken up again.
        precision: the number format, as it was resolved.
        step: optimiser steps done; all that a resume needs of data, crops and masks.
        state: what else to store; JSON.
        ema: averaged weights to store too.

    Raises:
        TrainingAborted: on a rank whose storage is full or fails.
    """
    run = Path(config.output)
    with _storage_told(run, step):
        folder = manifests.unfinished_path(run, step)
        ranks.run_on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
        engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        save_weights(engine, ranks, folder / WEIGHTS, config)
        if ema is not None:
            with ema.swapped():
                save_weights(engine, ranks, folder / EMA_WEIGHTS, config)
        ranks.barrier()
        names = manifests.list_files(folder)
        shares = ranks.gather(manifests.describe(folder, names[ranks.rank :: ranks.world_size]))
        content = {
            "format": 1,
            "step": step,
            "world_size": ranks.world_size,
            "zero_stage": config.zero_stage,
            "precision": precision,
            "config": config.model_dump(mode="json"),
            "state": state,
            "versions": {
                **{name: importlib.metadata.version(name) for name in ("fastmim", "torch", "deepspeed")},
                "commit": source_commit(),
            },
            "files": {name: facts for share in shares for name, facts in sorted(share.items())},
        }
        ranks.run_on_first(lambda: manifests.publish(run, step, content, config.checkpoint.keep))
        return manifests.checkpoint_path(run, step)


@contextmanager
def _storage_told(run: Path, step: int) -> Iterator[None]:
    """Storage that is full or fails ends a run in one line; only the checkpoint being written is lost."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in _TORCH_WRITER):
            raise
        raise TrainingAborted(
            f"the checkpoint of step {step} cannot be written below {run} ({error}); those before it are whole, and "
            "the same command goes on from the newest"
        ) from error


def load(engine: DeepSpeedEngine, checkpoint: Path, ema: EMA | None = None) -> None:
    """Restore weights and optimiser from a verified checkpoint; all ranks call it.

    Raises:
        CheckpointError: DeepSpeed found nothing to load.
    """
    found, _ = engine.load_checkpoint(str(checkpoint), tag=_TAG, load_lr_scheduler_states=False)
    if found is None:
        raise CheckpointError(f"{checkpoint}: DeepSpeed loaded nothing from {_TAG}/")
    if fitted := fitted_buffers(engine.module):
        stored = load_file(checkpoint / WEIGHTS)
        for name, buffer in fitted.items():
            buffer.copy_(stored[name])
    if ema is not None:
        averages = load_file(checkpoint / EMA_WEIGHTS)
        with ema.swapped():
            for name, parameter in engine.module.named_parameters():
                _set_full_parameter(engine, parameter, averages[name].to(parameter.device))


def check_same_run(
    manifest: dict[str, Any], config: Config, ranks: Ranks, precision: str, fingerprint: str
) -> None:
    """Refuse to continue a run as another one.

    Raises:
        CheckpointError: names each key that differs, the stored and the given value.
    """
    missing = {"config", "state", "world_size", "zero_stage", "precision"} - manifest.keys()
    if missing:
        raise CheckpointError(
            f"the checkpoint's manifest lacks {', '.join(sorted(missing))}; it is not of this version"
        )
    stored, given = _flatten(manifest["config"]), _flatten(config.model_dump(mode="json"))
    differing = [
        f"{key}={given.get(key)!r} (the checkpoint has {stored.get(key)!r})"
        for key in sorted(stored.keys() | given.keys())
        if not key.startswith(FREE_KEYS) and stored.get(key) != given.get(key)
    ]
    if manifest["state"]["fingerprint"] != fingerprint:
        differing.append(
            f"data.source={config.data.source!r} holds other images (fingerprint {fingerprint[:12]}, "
            f"the checkpoint has {manifest['state']['fingerprint'][:12]})"
        )
    facts = {"world_size": ranks.world_size, "zero_stage": config.zero_stage, "precision": precision}
    for key, value in facts.items():
        if manifest[key] != value:
            differing.append(f"{key.replace('_', ' ')} {value} (the checkpoint has {manifest[key]})")
    if differing:
        raise CheckpointError(
            f"cannot continue {config.output}: {'; '.join(differing)}. "
            "Restore these, or start another run with another output"
        )


def check_same_networks(manifest: dict[str, Any], config: Config, fingerprints: dict[str, str]) -> None:
    """Refuse to continue a run with another tokenizer or teacher than it began with.

    Args:
        manifest: of the checkpoint.
        config: of the run.
        fingerprints: of the networks in use, by the configuration's key that names their weights.

    Raises:
        CheckpointError: names the first that differs.
    """
    stored = manifest["state"].get("frozen", {})
    for key, fingerprint in fingerprints.items():
        if stored.get(key) != fingerprint:
            raise CheckpointError(
                f"cannot continue {config.output}: {key} holds other weights (fingerprint {fingerprint[:12]}, the "
                f"checkpoint has {stored.get(key, 'none')[:12]}). Restore them, or start another run"
            )


def save_weights(engine: DeepSpeedEngine, ranks: Ranks, path: Path, config: Config) -> None:
    """Write the whole float32 weights and fitted buffers as safetensors from rank 0; all ranks call it."""
    weights = {name: buffer.cpu().contiguous() for name, buffer in fitted_buffers(engine.module).items()}
    for name, parameter in engine.module.named_parameters():
        full = full_parameter(engine, parameter)
        if ranks.first:
            weights[name] = full.detach().float().cpu().contiguous()
    if ranks.first:
        metadata = {"format": "pt", "objective": config.objective.name}
        save_file(weights, path, metadata=metadata)


def fitted_buffers(module: nn.Module) -> dict[str, Tensor]:
    """What an objective fitted before training: its persistent buffers."""
    parameters = dict(module.named_parameters())
    return {name: value for name, value in module.state_dict().items() if name not in parameters}


def full_parameter(engine: DeepSpeedEngine, parameter: Tensor) -> Tensor:
    """The whole float32 value of a parameter that ZeRO may have sharded; all ranks call it."""
    full = safe_get_full_fp32_param(parameter)
    return _own_master(engine, parameter).detach() if full is None else full


def _set_full_parameter(engine: DeepSpeedEngine, parameter: Tensor, value: Tensor) -> None:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, value)
    else:
        with torch.no_grad():
            _own_master(engine, parameter).copy_(value)


def _own_master(engine: DeepSpeedEngine, parameter: Tensor) -> Tensor | Master:
    """Without ZeRO: what a 16-bit optimiser has of it, or the parameter itself."""
    optimizer = engine.optimizer
    return optimizer.masters.get(parameter, parameter) if isinstance(optimizer, SplitAdamW) else parameter


def master_tensors(engine: DeepSpeedEngine) -> list[Tensor | Master]:
    """This rank's float32 masters: shards under ZeRO, whole parameters without."""
    optimizer = engine.optimizer
    if isinstance(optimizer, SplitAdamW):
        return list(optimizer.masters.values())
    if not engine.zero_optimization():
        return list(engine.module.parameters())
    # Stages 1 and 2; stage 3; and stage 1 that sums gradients in another dtype than bf16.
    names = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"
    return list(next(getattr(optimizer, name) for name in names if hasattr(optimizer, name)))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
