"""Timing that several scripts share: contenders take turns, so a drift of the machine's speed cancels."""

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from fastmim.precision import choose_precision

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

LIBRARIES = ("torchvision", "timm", "transformers", "lightly", "deepspeed", "nvidia-dali-cuda130", "pillow")
"""Whose versions are told where they are installed: what a step, a loader or a peer is made of."""

FLUSH_BYTES = 512 * 2**20
"""Written before each sample on CUDA: more than any cache holds."""

FLUSHES = 8
"""Times that it is written: the device is busy for a millisecond or more, and the work queues behind it."""


def describe_machine(device: str) -> dict:
    """Return what a result needs to be read later: device, cores, threads, versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{_processor()} ({_instructions()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text().partition("model name")[2].splitlines()[0]
        return told.partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _instructions() -> str:
    """What PyTorch's operators are compiled for here, and whether products of bf16 are computed or emulated."""
    bf16 = "with" if "bf16" in computed_dtypes("cpu") else "without"
    return f"{torch.backends.cpu.get_cpu_capability()}, {bf16} bf16"


def computed_dtypes(device: str) -> dict[str, torch.dtype]:
    """The dtypes that a device's hardware multiplies, the faster one first; another is emulated, and slow."""
    fast = {"bf16": torch.bfloat16} if choose_precision("auto", torch.device(device)) == "bf16" else {}
    return {**fast, "fp32": torch.float32}


def time_in_turns(
    contenders: dict[str, Callable[[], object]], device: str, rounds: int = 20, warmup: int = 3
) -> dict[str, list[float]]:
    """Time each contender once a round.

    Args:
        contenders: name -> what to run; its result is dropped.
        device: "cuda" times with events behind a flush of the cache, "cpu" by the clock.
        rounds: samples per contender.
        warmup: rounds before those, which compile and allocate.

    Returns:
        name -> seconds, one a round.
    """
    once = _cuda_timer() if device == "cuda" else _clock
    samples = {name: [] for name in contenders}
    for round_number in range(warmup + rounds):
        for name, run in contenders.items():
            seconds = once(run)
            if round_number >= warmup:
                samples[name].append(seconds)
    return samples


def _clock(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _cuda_timer() -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def once(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(FLUSHES):
            flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return once


def host_time(run: Callable[[], object], rounds: int = 20) -> float:
    """Microseconds that Python takes to queue some work on an idle CUDA device: median."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        samples.append(_clock(run))
    return 1e6 * statistics.median(samples)


def summarise(samples: list[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile in microseconds.

    The percentiles are the samples next to them on the outside: of up to five, the least and the most.
    """
    ordered = sorted(samples)
    place = (len(ordered) - 1) // 5
    return {
        "median_us": 1e6 * statistics.median(ordered),
        "p20_us": 1e6 * ordered[place],
        "p80_us": 1e6 * ordered[-1 - place],
    }


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Return one contender's time over another's in each round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Return the median of their `ratios`."""
    return statistics.median(ratios(numerator, denominator))


def median_interval(samples: list[float]) -> tuple[float, float] | None:
    """Where the median of what was sampled lies, with 95 % confidence: two of the samples, by the normal approximation.

    Of fewer than six no two samples tell that.
    """
    ordered = sorted(samples)
    place = int((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2)
    return (ordered[place], ordered[-1 - place]) if len(ordered) >= 6 else None


def measure_copy_bandwidth(rounds: int = 20) -> float:
    """Bytes per second, read plus written, of a large copy on the current CUDA device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    samples = time_in_turns({"copy": lambda: target.copy_(source)}, "cuda", rounds)
    return 2 * source.numel() / statistics.median(samples["copy"])
