"""What each collective takes between ranks that exist, alone."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from benchmarks import harness
from benchmarks.communication import ROUNDS, Link
from benchmarks.gloo import Group
from fastmim.memory import ITEM
from fastmim.ranks import Ranks


def time_collective(name: str, numbers: int, precision: str) -> float:
    """Median seconds of one collective over so many numbers, all ranks' together, called on every rank."""
    values = _ones(numbers, precision)
    if name == "all_reduce":
        return _median_seconds(lambda: dist.all_reduce(values))
    share = values.chunk(dist.get_world_size())[dist.get_rank()]
    if name == "all_gather":
        return _median_seconds(lambda: dist.all_gather_into_tensor(values, share))
    summed = torch.empty_like(share)
    return _median_seconds(lambda: dist.reduce_scatter_tensor(summed, values))


def measure_link(group: Group, numbers: int, precision: str) -> Link:
    """Bandwidth of each collective between a group's ranks, and the latency of a tiny sum."""
    ranks = group.ranks
    numbers -= numbers % ranks
    latency = max(group.call(time_collective, "all_reduce", ranks, precision)) / ROUNDS["all_reduce"]
    crossing = (ranks - 1) / ranks * numbers * ITEM[precision]
    bandwidth = {}
    for name, rounds in ROUNDS.items():
        seconds = max(group.call(time_collective, name, numbers, precision)) / rounds
        bandwidth[name] = crossing / max(seconds - latency, 1e-9)
    return Link(bandwidth, latency)


def _ones(numbers: int, precision: str) -> torch.Tensor:
    return torch.ones(numbers, dtype=harness.DTYPES[precision], device=Ranks().device)


def _median_seconds(function: Callable[[], object], times: int = 3) -> float:
    seconds = []
    for _ in range(1 + times):
        dist.barrier()
        _wait()
        started = time.perf_counter()
        function()
        _wait()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def _wait() -> None:
    if Ranks().device.type == "cuda":
        torch.cuda.synchronize()
