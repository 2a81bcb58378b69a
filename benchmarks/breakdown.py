"""Where does one optimiser step of the same MAE spend its time, by kind of operation, here and elsewhere?

    python benchmarks/breakdown.py [--sizes small base] [--dtypes fp32] [--mae-path CLONE] [--json PATH] [--plot FILE]

The contenders of `peers.py`, eager, under PyTorch's profiler. An operation counts for itself, without those that it
calls. What is no product of matrices is what an engine can save without computing less.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

# Run as a script, Python looks here first, where this file would pass for a package called `kernels`.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import harness, markdown, peers, report
from benchmarks.contenders import Problem, write_weights
from fastmim.objectives import build_objective
from fastmim.ranks import Ranks

LINEARS, ATTENTION, OPTIMISER, OTHER = "linears", "attention", "optimiser", "other"
_OPTIMISER = "Optimizer.step#"
"""What PyTorch calls the range of an optimiser's step."""
_NAMES = {
    LINEARS: "addmm|mm|.*convolution.*|.*linear.*",
    ATTENTION: "bmm|baddbmm|.*attention.*|.*softmax.*",
    "LayerNorm": ".*layer_norm.*|.*norm_rows.*",
    "GELU": ".*gelu.*",
    "copies": "copy_|cat|gather|.*scatter.*|index.*",
    "sums": "(add|mul|div)_?|sum",
}
"""Kind -> pattern of an operation's whole name."""
KINDS = (*_NAMES, OPTIMISER, OTHER)


def kind_of(event: FunctionEvent) -> str:
    """What an operation is for; all that an optimiser calls is the optimiser's."""
    above: FunctionEvent | None = event
    while above is not None:
        if above.name.startswith(_OPTIMISER):
            return OPTIMISER
        above = above.cpu_parent
    name = event.name.removeprefix("aten::")
    return next((kind for kind, pattern in _NAMES.items() if re.fullmatch(pattern, name)), OTHER)


def seconds_by_kind(step: Callable[[], Tensor]) -> dict[str, float]:
    """Seconds of each kind in one step; on CUDA, of the device."""
    on_cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    return sum_by_kind(profiler.events(), on_cuda)


def sum_by_kind(events: Iterable[FunctionEvent], on_cuda: bool) -> dict[str, float]:
    """Seconds of each kind, every operation for itself."""
    spent = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if on_cuda and (event.device_type != DeviceType.CPU or event.is_user_annotation):
            continue  # a kernel's time is its operation's already
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        spent[kind_of(event)] += own / 1e6
    return spent


def measure(problem: Problem, size: str, names: list[str], rounds: int, rate: report.PeakRate) -> list[dict]:
    """A row of each contender: seconds of every kind, the medians over rounds, in which they take turns."""
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(peers.worker_of(name, problem)) for name in names}
        for _ in range(2):
            losses = {name: worker.step() for name, worker in workers.items()}
            report.require_same(losses, peers.TOLERANCE[problem.precision])
        for _ in range(rounds):
            for name, worker in workers.items():
                spent[name].append(worker.measure_step(seconds_by_kind))
            rate.measure(problem.precision)
        memory = {name: worker.peak_memory() for name, worker in workers.items()}
    samples = {name: [sum(kinds.values()) for kinds in each] for name, each in spent.items()}
    fastest = min(
        (name for name in names if name != peers.OURS),
        key=lambda name: harness.summarise(samples[name])["median_us"],
    )
    flops = build_objective(problem.config).step_flops() * problem.batch
    return [
        {
            **report.timed_row(
                name,
                size,
                problem.precision,
                samples[name],
                baseline=samples[fastest],
                images=problem.batch,
                flops=flops,
                baseline_flops=flops,
                peak_memory=memory[name],
            ),
            "kinds": {
                kind: harness.summarise([kinds[kind] for kinds in spent[name]])["median_us"] / 1e6
                for kind in KINDS
            },
            "kinds_samples": spent[name],
        }
        for name in names
    ]


def fill(rows: list[dict], rate: report.PeakRate) -> list[dict]:
    """Rows with what the peak of the whole run says of them."""
    for row in rate.fill(rows):
        row["products_at_peak_s"] = row["flops"] / rate.best(row["dtype"])
    return rows


def bounds(own: dict, peer: dict) -> list[float]:
    """How many times as fast as a peer's whole step this engine's products alone are, in each round."""
    products = [kinds[LINEARS] + kinds[ATTENTION] for kinds in own["kinds_samples"]]
    return harness.ratios(peer["samples"], products)


def tables(stored: dict) -> dict[str, str]:
    """The page's table of stored rows: `breakdown`."""
    header = ["implementation", "size", "dtype", "step", *KINDS, "products at the peak"]
    lines = [
        [
            *(row[key] for key in ("variant", "size", "dtype")),
            *(
                f"{1e3 * seconds:.0f}"
                for seconds in (row["median_s"], *row["kinds"].values(), row["products_at_peak_s"])
            ),
        ]
        for row in stored["rows"]
    ]
    return {"breakdown": markdown.table(header, lines)}


def judge(rows: list[dict]) -> list[str]:
    """A line for each size and dtype: what this engine would reach if nothing but its products took time."""
    lines = []
    for size, dtype in dict.fromkeys((row["size"], row["dtype"]) for row in rows):
        alike = [row for row in rows if (row["size"], row["dtype"]) == (size, dtype)]
        own = next(row for row in alike if row["variant"] == peers.OURS)
        fastest = min((row for row in alike if row is not own), key=lambda row: row["median_s"])
        products = sum(own["kinds"][kind] for kind in (LINEARS, ATTENTION))
        bound = bounds(own, fastest)
        lines.append(
            f"{size} {dtype}: linears and attention are {products / own['median_s']:.0%} of this engine's step; if "
            f"nothing else took time, it would be {median(bound):.2f} times as fast as {fastest['variant']} "
            f"({min(bound):.2f} to {max(bound):.2f} in a round); target {peers.TARGETS['ratio']}"
        )
    return lines


def draw(path: Path, rows: list[dict]) -> None:
    """Seconds of each kind, a group of bars for each contender."""
    groups = [f"{row['variant']}\n{row['size']} {row['dtype']}" for row in rows]
    bars = {kind: [row["kinds"][kind] for row in rows] for kind in KINDS}
    report.draw_bars(path, groups, bars, "seconds of a step")


def main(arguments: list[str] | None = None) -> None:
    """Profile, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = peers.parse(parser, arguments)
    names = peers.contenders(args.mae_path)
    rows, rate = [], report.PeakRate(Ranks().device)
    for size in args.sizes:
        config = peers.configure(size, args.batch, args.set)
        with tempfile.TemporaryDirectory() as folder:
            write_weights(config, Path(folder))
            for dtype in args.dtypes:
                problem = Problem(config, dtype, args.batch, Path(folder), args.mae_path)
                rows += measure(problem, size, names, args.rounds, rate)
    facts = {"peak_flops": rate.samples, "published": peers.clone_commit(args.mae_path)}
    stored = report.store("breakdown", fill(rows, rate), args, **facts)
    print("\n\n".join([*tables(stored).values(), *judge(rows)]))
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    main()
