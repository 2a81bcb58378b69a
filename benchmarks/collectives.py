"""What each collective takes between ranks that exist, alone."""

import math
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


def time_collective(name: str, numbers: int, precision: str, messages: int = 1) -> float:
    """Median seconds of one collective over so many numbers, all ranks' together, called on every rank.

    Args:
        name: of `ROUNDS`.
        numbers: a multiple of messages and ranks.
        precision: of the numbers.
        messages: that they are sent in, one after the other.
    """
    parts = _ones(numbers, precision).chunk(messages)
    shares = [part.chunk(dist.get_world_size())[dist.get_rank()] for part in parts]
    calls = {
        "all_reduce": lambda: [dist.all_reduce(part) for part in parts],
        "all_gather": lambda: [
            dist.all_gather_into_tensor(*pair) for pair in zip(parts, shares, strict=True)
        ],
        "reduce_scatter": lambda: [
            dist.reduce_scatter_tensor(torch.empty_like(share), part)
            for part, share in zip(parts, shares, strict=True)
        ],
    }
    return _median_seconds(calls[name])


def measure_link(group: Group, numbers: int, precision: str, gathers: int = 1) -> Link:
    """Bandwidth of each collective between a group's ranks, and the latency of a tiny sum.

    Args:
        group: of two ranks or more.
        numbers: that a collective sends, but for the rest of an even division.
        precision: of the numbers.
        gathers: messages in which they are gathered; what each costs is part of the bandwidth.
    """
    ranks = group.ranks
    numbers -= numbers % (ranks * gathers)
    rounds_of_tiny = ROUNDS["all_reduce"] * math.ceil(math.log2(ranks))
    latency = max(group.call(time_collective, "all_reduce", ranks, precision)) / rounds_of_tiny
    crossing = (ranks - 1) / ranks * numbers * ITEM[precision]
    bandwidth = {}
    for name, rounds in ROUNDS.items():
        messages = gathers if name == "all_gather" else 1
        seconds = max(group.call(time_collective, name, numbers, precision, messages)) / rounds
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
