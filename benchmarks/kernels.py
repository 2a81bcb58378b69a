"""How many bytes do the kernels move, what do the compilers make of them, and how fast are they?

    python benchmarks/kernels.py --static [--json PATH]   anywhere: counted, compiled, predicted; measures nothing
    python benchmarks/kernels.py [--json PATH]            on a CUDA device: times the same rows
    python benchmarks/kernels.py --counted PATH ...       the same, with what --static --json PATH counted before
    python benchmarks/kernels.py --cpu [--json PATH]      the CPU path against the public formulation

`benchmarks/README.md` explains the columns.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from unittest import mock

# Run as a script, Python looks here first, where this file would pass for a package called `kernels`.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from fastmim.kernels import _dispatch

from benchmarks import harness, markdown, report, rows
from benchmarks.cases import CASES
from benchmarks.compiled import TARGETS
from benchmarks.problems import SHAPES, Problem, Shape
from fastmim.provenance import source_commit

CPU_TARGETS = {"masked_pixel_loss": 2.0, "unshuffle": 1.5}
"""Kernels that `--cpu` times, and how much faster than the public formulation they are meant to be."""


def contenders(problem: Problem, name: str, compiler: str) -> dict:
    """Return what is timed of one pass: fused, eager, and eager compiled by a `torch.compile` backend."""
    functions = {
        "fused": (problem.fused, problem.fused_args),
        "eager": (problem.naive, problem.naive_args),
        "compiled": (
            torch.compile(problem.naive, backend=compiler, fullgraph=True, dynamic=False),
            problem.naive_args,
        ),
    }
    if name == "backward":
        return {key: rows.prepare_backward(*value) for key, value in functions.items()}
    return {key: functools.partial(function, *args) for key, (function, args) in functions.items()}


def measure_pass(
    problem: Problem, name: str, device: str, copy_bandwidth: float, rounds: int, compiler: str = "inductor"
) -> dict:
    """Time one pass; GB/s are the floor's bytes over the time, so that contenders compare.

    On CUDA the device's time is told, and what Python takes to queue the work, which hides behind other work or not.
    """
    # A compiled backward pass is run more than once per forward pass here.
    with mock.patch("torch._functorch.config.donated_buffer", False):
        runs = contenders(problem, name, compiler)
        samples = harness.time_in_turns(runs, device, rounds)
        host = {key: harness.host_time(run) for key, run in runs.items()} if device == "cuda" else {}
    measured = {}
    for key, seconds in samples.items():
        summary = harness.summarise(seconds)
        speed = problem.floor[name] / (1e-6 * summary["median_us"])
        measured[key] = {
            **summary,
            "gb_per_s": 1e-9 * speed,
            "copy_percent": 100 * speed / copy_bandwidth,
            "times_fused": harness.ratio(seconds, samples["fused"]),
            **({"host_us": host[key]} if host else {}),
            "samples": seconds,
        }
    return measured


def measure_rows(
    jobs: list[tuple[str, str, Shape]],
    device: str,
    arch: str,
    copy_bandwidth: float,
    rounds: int,
    compiler: str = "inductor",
    static: Callable[[list, list[str]], Iterable[dict]] = rows.static_rows,
) -> list[dict]:
    """Return the static rows for one architecture, each with what was measured, or with its error.

    A contender that fails, such as one that the compiler refuses, does not end an unattended run. `static` counts, or
    tells what was counted before.
    """
    measured = []
    for kernel, dtype, shape in jobs:
        print(f"{kernel} {dtype} {shape.name}", file=sys.stderr)
        problem = rows.build(kernel, dtype, shape, device)
        for row in static([(kernel, dtype, shape)], [arch]):
            # Every shape is compiled for itself: a second one would otherwise be compiled for any size.
            torch.compiler.reset()
            row["copy_gb_per_s"] = 1e-9 * copy_bandwidth
            try:
                row["measured"] = measure_pass(problem, row["pass"], device, copy_bandwidth, rounds, compiler)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
                print(f"{kernel} {row['pass']}: {row['error']}", file=sys.stderr)
            measured.append(row)
    return measured


def measure_on_cpu(kernels: list[str], shape: Shape, dtypes: list[str], rounds: int) -> list[dict]:
    """Time forward + backward of the CPU path against the public formulation."""
    measured = []
    for kernel in kernels:
        for dtype in dtypes:
            problem = rows.build(kernel, dtype, shape, "cpu")
            runs = {
                "naive": lambda p=problem: rows.prepare_backward(p.naive, p.naive_args)(),
                "reference": lambda p=problem: rows.prepare_backward(p.fused, p.fused_args)(),
            }
            with mock.patch.object(_dispatch, "MODE", "reference"):
                samples = harness.time_in_turns(runs, "cpu", rounds)
            measured.append(
                {
                    **report.timed_row(
                        kernel,
                        f"{shape.name} batch {shape.batch}",
                        dtype,
                        samples["reference"],
                        baseline=samples["naive"],
                        images=shape.batch,
                    ),
                    "pass": "forward+backward",
                    "naive_samples": samples["naive"],
                    "target": CPU_TARGETS[kernel],
                }
            )
    return measured


def print_table(title: str, header: list[str], lines: list[list]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n{markdown.table(header, lines)}")


def print_static(table: list[dict]) -> None:
    """Print the compilers' figures per arch, then bytes and predictions once per pass."""
    names = ["kernel", "pass", "dtype", "shape"]
    figures = ["arch", "registers", "spills", "shared_bytes", "load_bits", "store_bits", "occupancy"]
    lines = [[row[name] for name in names + figures] for row in table]
    print_table("Compiled, read from machine code:", names + figures, lines)
    once = {tuple(row[name] for name in names): row for row in table}
    lines = []
    for identity, row in once.items():
        floor = row["floor_bytes"]
        ratios = [f"{row[key] / floor:.3f}" for key in ("bytes", "distinct_bytes", "sector_bytes")]
        eager = [f"{row['eager_bytes'] / floor:.1f}", row["eager_launches"]]
        predicted = [f"{microseconds:.1f}" for microseconds in row["predicted_us"].values()]
        lines.append([*identity, f"{floor / 1e6:.2f}", *ratios, row["launches"], *eager, *predicted])
    header = [*names, "floor MB", "bytes / floor", "distinct / floor", "sectors / floor", "launches"]
    header += ["eager / floor", "eager launches", *(f"predicted µs {gpu}" for gpu in rows.BANDWIDTH)]
    print_table("Bytes, counted; times are predicted from published bandwidth, not measured:", header, lines)


def print_measured(table: list[dict]) -> None:
    """Print what was timed on a CUDA device."""
    names = ["kernel", "pass", "dtype", "shape"]
    header = [
        *names,
        "contender",
        "median µs",
        "p20",
        "p80",
        "GB/s of the floor",
        "% of copy",
        "× fused",
        "host µs",
    ]
    lines = []
    for row in table:
        for contender, time in row.get("measured", {}).items():
            cells = [f"{value:.1f}" for key, value in time.items() if key != "samples"]
            lines.append([*(row[name] for name in names), contender, *cells])
    print_table("Measured:", header, lines)


def tables(stored: dict) -> dict[str, str]:
    """The page's table of rows that were timed on a CUDA device: `kernels`."""
    header = ["kernel", "pass", "shape", "µs", "p20–p80", "% of copy", "eager µs", "compiled µs"]
    lines = []
    for row in stored["rows"]:
        if "error" in row:
            lines.append([*(row[name] for name in header[:3]), row["error"], *4 * ["–"]])
            continue
        fused, eager, compiled = (row["measured"][name] for name in ("fused", "eager", "compiled"))
        lines.append(
            [
                *(row["kernel"], row["pass"], row["shape"]),
                *(f"{fused['median_us']:.1f}", f"{fused['p20_us']:.1f}–{fused['p80_us']:.1f}"),
                f"{fused['copy_percent']:.0f}",
                *(f"{other['median_us']:.1f}" for other in (eager, compiled)),
            ]
        )
    return {"kernels": markdown.table(header, lines)}


def print_cpu(table: list[dict]) -> None:
    """Print the CPU's times."""
    lines = []
    for row in table:
        times = [f"{1e3 * median(row[name]):.1f}" for name in ("naive_samples", "samples")]
        identity = [row[name] for name in ("variant", "pass", "dtype", "size")]
        lines.append([*identity, *times, f"{row['ratio']:.2f}", row["target"]])
    header = ["kernel", "pass", "dtype", "shape", "naive ms", "reference ms", "naive / reference", "target"]
    print_table("Measured on this CPU:", header, lines)


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--static", action="store_true", help="count, compile and predict; needs no GPU")
    mode.add_argument("--cpu", action="store_true", help="time the CPU path")
    parser.add_argument("--json", type=Path, help="where to store the rows")
    parser.add_argument(
        "--counted", type=Path, metavar="PATH", help="rows of --static --json; nothing is counted again"
    )
    parser.add_argument("--kernels", nargs="+", choices=CASES, help="default: all that the mode has")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="not with --cpu (default: all)")
    parser.add_argument("--dtypes", nargs="+", choices=rows.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--archs", nargs="+", choices=TARGETS, help="of --static (default: all)")
    parser.add_argument("--rounds", type=int, default=20, help="not of --static (default 20)")
    args = parser.parse_args(arguments)
    if args.archs and not args.static:
        parser.error("--archs is for --static; what is timed is timed on the device that is here")
    if args.shapes and args.cpu:
        parser.error("--shapes is not for --cpu, which times ViT-B")
    having = CPU_TARGETS if args.cpu else CASES
    if unknown := set(args.kernels or ()) - set(having):
        parser.error(f"--cpu --kernels {' '.join(sorted(unknown))}; expected of {', '.join(having)}")
    args.kernels, args.shapes = args.kernels or list(having), args.shapes or list(SHAPES)
    args.archs = args.archs or list(TARGETS)
    if args.counted and (args.static or args.cpu):
        parser.error(
            "--counted is for timing on a CUDA device; --static counts itself, --cpu needs no counts"
        )
    if not (args.static or args.cpu or torch.cuda.is_available()):
        parser.error("no CUDA device; --static and --cpu need none")
    if args.counted and not args.counted.exists():
        parser.error(f"--counted {args.counted} does not exist; expected what --static --json wrote")
    return args


def read_counted(path: Path, jobs: list[tuple[str, str, Shape]], arch: str) -> Callable:
    """What gives the rows of a job from a stored table, which must have all of them: else the script ends in a line."""
    static = functools.partial(rows.stored_rows, json.loads(path.read_text())["rows"])
    try:
        list(static(jobs, [arch]))
    except ValueError as error:
        sys.exit(f"--counted {path}: {error}")
    return static


def main(arguments: list[str] | None = None) -> None:
    """Print tables, and write JSON where asked."""
    args = read_arguments(arguments)
    jobs = rows.plan(args.kernels, args.dtypes, [SHAPES[name] for name in args.shapes])
    if args.static:
        table, mode = list(rows.static_rows(jobs, args.archs)), "static"
        print_static(table)
    elif args.cpu:
        shape = Shape("ViT-B/16", 16, 768, batch=32)
        table, mode = measure_on_cpu(args.kernels, shape, args.dtypes, args.rounds), "cpu"
        print_cpu(table)
    else:
        arch, mode = rows.local_arch(), "cuda"
        static = read_counted(args.counted, jobs, arch) if args.counted else rows.static_rows
        bandwidth = harness.measure_copy_bandwidth()
        table = measure_rows(jobs, "cuda", arch, bandwidth, args.rounds, static=static)
        print_static(table)
        print_measured(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        machine = harness.describe_machine("cuda" if mode == "cuda" else "cpu")
        told = {"machine": {"mode": mode, **machine, "commit": source_commit()}}
        names = ("kernels", "dtypes", "rounds", *(() if args.cpu else ("shapes",)))
        told["arguments"] = {name: str(getattr(args, name)) for name in names}
        args.json.write_text(json.dumps({**told, "rows": table}, indent=1))
    if any("error" in row for row in table):
        sys.exit("some rows could not be measured; see above")


if __name__ == "__main__":
    main()
