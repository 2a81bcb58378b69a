"""Which bytes are parameters, gradients and optimiser state, as DeepSpeed holds them on this rank."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from fastmim.checkpoint import master_tensors


def held_bytes(engine: DeepSpeedEngine, device: torch.device) -> dict[str, int]:
    """Bytes of each kind on a device, whole or sharded as they are; memory that tensors share counts once.

    Buckets are what ZeRO reduces gradients in, with the gradients that are in them.

    Args:
        engine: of the run.
        device: its type is read; what is offloaded to another is not counted.
    """
    module: Any = engine.module
    optimizer: Any = engine.optimizer
    parameters = list(module.parameters())
    plain = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed wraps all but plain float32
    flats = getattr(plain, "flats", [])  # of SplitAdamW
    stepped = [parameter for group in plain.param_groups for parameter in group["params"]]
    found = {
        "parameters": [*parameters, *_tensors([getattr(p, "ds_tensor", None) for p in parameters])],
        "buckets": list(_tensors([value for name, value in vars(optimizer).items() if "ipg" in name])),
        "gradients": [
            *_tensors([tensor.grad for tensor in (*parameters, *stepped)]),
            *_tensors([getattr(parameter, "grad_accum", None) for parameter in parameters]),
            *_tensors([value for name, value in vars(optimizer).items() if "grad" in name]),
        ],
        "optimiser": list(_tensors([master_tensors(engine), stepped, list(plain.state.values()), flats])),
    }
    seen: set[int] = set()
    return {kind: _count(tensors, device, seen) for kind, tensors in found.items()}


def traced_peak(events: list[dict[str, Any]]) -> int:
    """Most bytes that tensors on the CPU took during a trace, above what they took at its start.

    Args:
        events: `traceEvents` of a Chrome trace that was made with `profile_memory`.
    """
    level = peak = 0
    memory = (event for event in events if event.get("name") == "[memory]")
    for event in sorted(memory, key=lambda event: event["ts"]):
        if event["args"]["Device Type"] == 0:
            level += event["args"]["Bytes"]
            peak = max(peak, level)
    return peak


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers and dataclasses, as ZeRO's buckets are."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(vars(value))


def _count(tensors: list[Tensor], device: torch.device, seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == device.type and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
