"""Rows of the kernel benchmark that need no GPU: counted, compiled, predicted."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.compiled import inspect_launch, record_launches
from benchmarks.counting import Traffic, count_traffic
from benchmarks.problems import Inputs, Problem, Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BANDWIDTH = {"A100": 2.039e12, "H100": 3.35e12, "B200": 8.0e12}
"""Published memory bandwidth, bytes per second: NVIDIA's data sheets, A100 80GB SXM, H100 SXM, B200 SXM."""

INTEGER = "int64"
"""The dtype of a row whose kernel moves no floats."""

Counts = dict[str, dict[str, Traffic]]


def tensors(result) -> list[Tensor]:
    """Return an operation's results; those that require a gradient are differentiated."""
    return list(result) if isinstance(result, tuple) else [result]


def prepare_backward(function: Callable, args: tuple) -> Callable[[], tuple] | None:
    """Run forward; return the backward pass, to be called any number of times, or None without a gradient."""
    return _backward_of(function(*args), args)


def _backward_of(result, args: tuple) -> Callable[[], tuple] | None:
    results = [tensor for tensor in tensors(result) if tensor.requires_grad]
    if not results:
        return None
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    gradients = [torch.ones_like(result) for result in results]
    return lambda: torch.autograd.grad(results, leaves, gradients, retain_graph=True)


def count_passes(function: Callable, args: tuple) -> dict[str, Traffic]:
    """Count each pass of an operation on CPU tensors; Triton kernels are interpreted."""
    counts = {}
    with count_traffic() as counts["forward"]:
        result = function(*args)
    backward = _backward_of(result, args)
    if backward is not None:
        with count_traffic() as counts["backward"]:
            backward()
    return counts


def count_problem(problem: Problem) -> Counts:
    """Count "fused" and "eager" of one problem on the CPU."""
    return {
        "fused": count_passes(problem.fused, problem.fused_args),
        "eager": count_passes(problem.naive, problem.naive_args),
    }


def record_passes(problem: Problem) -> dict[str, list]:
    """Return the Triton launches of each pass, without running them."""
    with record_launches() as launches:
        backward = prepare_backward(problem.fused, problem.fused_args)
        recorded = {"forward": list(launches)}
        if backward is not None:
            launches.clear()
            backward()
            recorded["backward"] = list(launches)
    return recorded


def summarise_launches(launches: list, arch: str) -> dict:
    """Compile a pass's launches: the most registers and memory, all spills, the widest access.

    A pass without a Triton launch has zeros, and no occupancy.
    """
    facts = [inspect_launch(launch, arch) for launch in launches]
    return {
        "registers": max((fact["registers"] for fact in facts), default=0),
        "spills": sum(fact["spills"] for fact in facts),
        "shared_bytes": max((fact["shared_bytes"] for fact in facts), default=0),
        "load_bits": max((fact["load_bits"] for fact in facts), default=0),
        "store_bits": max((fact["store_bits"] for fact in facts), default=0),
        "occupancy": min((fact["occupancy"] for fact in facts), default=None),
        "triton_kernels": facts,
    }


def _signature(args: Iterable) -> tuple:
    return tuple((tuple(arg.shape), arg.dtype) if isinstance(arg, Tensor) else arg for arg in args)


def plan(
    kernels: Iterable[str], dtypes: Iterable[str], shapes: Iterable[Shape]
) -> list[tuple[str, str, Shape]]:
    """List what to report: (kernel, dtype, shape)."""
    jobs = []
    for kernel in kernels:
        kinds = [INTEGER] if CASES[kernel].integer else dtypes
        jobs += [(kernel, dtype, shape) for dtype in kinds for shape in map(reported_as(kernel), shapes)]
    return jobs


def reported_as(kernel: str) -> Callable[[Shape], Shape]:
    """Return what sets a shape's batch to the one that a kernel's rows report."""
    entry = CASES[kernel]
    return lambda shape: shape if entry.scales else replace(shape, batch=entry.counted_batch)


def build(kernel: str, dtype: str, shape: Shape, device: str, batch: int | None = None) -> Problem:
    """Build a kernel's problem, at another batch than the shape's if given."""
    kind = torch.int64 if dtype == INTEGER else DTYPES[dtype]
    return CASES[kernel].build(Inputs(shape, batch or shape.batch, kind, device))


def static_rows(jobs: list[tuple[str, str, Shape]], archs: list[str]) -> Iterator[dict]:
    """Yield one row per kernel, dtype, shape, pass and arch.

    Bytes are counted at the case's `counted_batch` and scaled to the shape's batch: what all samples share is
    over-counted by that, never under-counted. Distinct bytes keep their ratio to the floor instead.
    """
    counted = {}
    for kernel, dtype, shape in jobs:
        entry = CASES[kernel]
        small = build(kernel, dtype, shape, "cpu", entry.counted_batch)
        key = kernel, _signature(small.fused_args), _signature(small.naive_args)
        if key not in counted:
            counted[key] = count_problem(small)
        counts = counted[key]
        problem = build(kernel, dtype, shape, "cpu")
        for name, launches in record_passes(problem).items():
            moved = _bytes_row(counts, name, small, problem, shape.batch / entry.counted_batch)
            for arch in archs:
                yield {
                    **{"kernel": kernel, "pass": name, "dtype": dtype},
                    **{"shape": f"{shape.name} batch {shape.batch}", "arch": arch},
                    **summarise_launches(launches, arch),
                    **moved,
                    "counted_batch": entry.counted_batch,
                }


def stored_rows(stored: list[dict], jobs: list[tuple[str, str, Shape]], archs: list[str]) -> Iterator[dict]:
    """Yield what `static_rows` would, from rows that it made before, on any machine.

    Raises:
        ValueError: a job has no rows for these archs.
    """
    for kernel, dtype, shape in jobs:
        wanted = {"kernel": kernel, "dtype": dtype, "shape": f"{shape.name} batch {shape.batch}"}
        found = [row for row in stored if row["arch"] in archs and wanted.items() <= row.items()]
        if not found:
            described = " ".join(wanted.values())
            raise ValueError(f"no stored rows of {described} for {', '.join(archs)}; wanted some")
        yield from (dict(row) for row in found)


def _bytes_row(counts: Counts, name: str, small: Problem, problem: Problem, times: float) -> dict:
    fused, eager = counts["fused"][name], counts["eager"][name]

    def scaled(count: int) -> int:
        return round(count * times)

    return {
        "bytes": scaled(fused.bytes),
        "sector_bytes": scaled(fused.sector_bytes),
        "distinct_bytes": round(fused.distinct_bytes * problem.floor[name] / small.floor[name]),
        "floor_bytes": problem.floor[name],
        "launches": fused.launches,
        "eager_bytes": scaled(eager.bytes),
        "eager_launches": eager.launches,
        "predicted_us": {gpu: 1e6 * scaled(fused.bytes) / speed for gpu, speed in BANDWIDTH.items()},
        "eager_predicted_us": {gpu: 1e6 * scaled(eager.bytes) / speed for gpu, speed in BANDWIDTH.items()},
    }


def local_arch() -> str:
    """Return the key of `TARGETS` that is nearest to the current CUDA device."""
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability()[0]
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")
