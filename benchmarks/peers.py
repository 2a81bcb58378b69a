"""How fast, and in how much memory, is one optimiser step of the same MAE here and elsewhere?

    python benchmarks/peers.py [--sizes small base] [--dtypes fp32] [--mae-path CLONE] [--json PATH] [--plot FILE]

This engine, `transformers`, `lightly` where it is installed (`pip install -e ".[bench]"`) and, from a user's clone,
facebookresearch/mae; each eager and compiled. See `contenders.py` for what each is given.
"""

import argparse
import functools
import importlib.util
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

# Run as a script, Python looks here first, where this file would pass for a package called `kernels`.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, markdown, report
from benchmarks.contenders import CONTENDERS, DTYPES, IMPORTS, Problem, write_weights
from benchmarks.peers_published import FILE
from benchmarks.workers import Worker
from fastmim import recipes
from fastmim.config import MODEL_SIZES, Config
from fastmim.flops import measure_peak_flops
from fastmim.objectives import build_objective
from fastmim.ranks import Ranks

TOLERANCE = {"bf16": 5e-3, "fp32": 1e-4}
"""Of the losses, relative: two steps, so that the second sees the first's update."""
OURS = "fastmim"
MODES = ("eager", "compiled")
TARGETS = {"ratio": 1.25, "memory": 0.75}
"""Times the fastest peer's fastest mode, and its peak memory, that are aimed at on a CPU."""


def configure(size: str, batch: int, overrides: list[str]) -> Config:
    """The MAE of a size: plain pixels, as peers have it by default, and a learning rate whose update shows."""
    words = ["objective.norm_pix_loss=false", "deepspeed.zero_optimization.stage=1"]
    return recipes.override(
        [f"model.size={size}", f"optim.batch_size={batch}", f"optim.blr={0.256 / batch}", *words, *overrides]
    )


def contenders(mae_path: Path | None) -> list[str]:
    """The names that can run here; a line for each that cannot."""
    present = {"lightly": importlib.util.find_spec("lightly") is not None}
    present["facebookresearch/mae"] = mae_path is not None
    how = {"lightly": 'pip install -e ".[bench]"', "facebookresearch/mae": "--mae-path CLONE"}
    for name in CONTENDERS:
        if not present.get(name, True):
            print(f"{name} is left out ({how[name]})", file=sys.stderr)
    return [name for name in CONTENDERS if present.get(name, True)]


def worker_of(name: str, problem: Problem) -> Worker:
    """A process that makes the steps of a contender."""
    build = CONTENDERS[name]
    return Worker(build, problem, imports=IMPORTS[build])


def measure_memory(problem: Problem, name: str, mode: str, timed: Worker | None = None) -> int:
    """Bytes of a contender in a step after a warm-up: in a fresh process, or on a GPU in the one that was timed."""
    if timed is not None:
        timed.forget_peak()
        timed.step(mode == "compiled")
        return timed.peak_memory()
    with worker_of(name, problem) as worker:
        for _ in range(2):
            worker.step(mode == "compiled")
        return worker.peak_memory()


def measure(
    problem: Problem, size: str, names: list[str], modes: list[str], rounds: int, warmup: int
) -> list[dict]:
    """The rows of a size and dtype: losses are compared, then time and memory measured."""
    flops = build_objective(problem.config).step_flops() * problem.batch
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker_of(name, problem)) for name in names}
        for _ in range(2):
            report.require_same(
                {name: worker.step() for name, worker in workers.items()}, TOLERANCE[problem.precision]
            )
        steps = {
            (name, mode): functools.partial(worker.step, mode == "compiled")
            for mode in modes
            for name, worker in workers.items()
        }
        # By the clock on every device: a worker answers when its device is done.
        samples = harness.time_in_turns(steps, "cpu", rounds, warmup)
        on_gpu = problem.device.type == "cuda"
        memory = {key: measure_memory(problem, *key, workers[key[0]]) for key in samples} if on_gpu else {}
    medians = {key: harness.summarise(seconds)["median_us"] for key, seconds in samples.items()}
    peers = [key for key in samples if key[0] != OURS]
    fastest = min(peers, key=medians.__getitem__)
    memory = memory or {key: measure_memory(problem, *key) for key in samples}
    peak = measure_peak_flops(Ranks().device, DTYPES[problem.precision])
    return [
        report.timed_row(
            f"{name}, {mode}",
            size,
            problem.precision,
            seconds,
            baseline=samples[fastest],
            images=problem.batch,
            flops=flops,
            baseline_flops=flops,
            peak_flops=peak,
            peak_memory=memory[name, mode],
            memory_ratio=memory[name, mode] / memory[fastest],
            name=name,
            against=", ".join(fastest),
        )
        for (name, mode), seconds in samples.items()
    ]


def tables(stored: dict) -> dict[str, str]:
    """The page's table of stored rows: `peers`."""
    header = ["implementation", "size", "dtype", "median ms", "p20–p80", "images/s", "MFU", "peak MiB"]
    header += ["× the fastest peer", "of its memory"]
    lines = [
        [
            *(row[key] for key in ("variant", "size", "dtype")),
            f"{1e3 * row['median_s']:.0f}",
            f"{1e3 * row['p20_s']:.0f}–{1e3 * row['p80_s']:.0f}",
            f"{row['images_per_s']:.1f}",
            f"{row['mfu']:.0%}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['memory_ratio']:.2f}",
        ]
        for row in stored["rows"]
    ]
    return {"peers": markdown.table(header, lines)}


def judge(rows: list[dict]) -> list[str]:
    """A line for each size and dtype: what this engine's faster mode reaches of the targets."""
    lines = []
    for size, dtype in dict.fromkeys((row["size"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["size"], row["dtype"]) == (size, dtype) and row["name"] == OURS]
        best = max(own, key=lambda row: row["ratio"])
        lines.append(
            f"{size} {dtype}: {best['variant']} is {best['ratio']:.2f} times as fast as {best['against']} in "
            f"{best['memory_ratio']:.2f} of its memory; targets {TARGETS['ratio']} and {TARGETS['memory']}"
        )
    return lines


def draw(path: Path, rows: list[dict]) -> None:
    """Seconds of a step, a group of bars for each size and dtype."""
    groups = list(dict.fromkeys(f"{row['size']} {row['dtype']}" for row in rows))
    bars: dict[str, list[float]] = {}
    for row in rows:
        bars.setdefault(row["variant"], []).append(row["median_s"])
    report.draw_bars(path, groups, bars, "seconds a step")


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse with the options that tell which steps of whom are compared, and those of every script."""
    parser.add_argument("--sizes", nargs="+", choices=MODEL_SIZES, default=["small", "base"])
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(harness.computed_dtypes(Ranks().device.type)),
        help="default: what the hardware computes",
    )
    parser.add_argument("--batch", type=int, default=16, help="images in a step (default 16)")
    parser.add_argument("--mae-path", type=Path, metavar="CLONE", help="a clone of facebookresearch/mae")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the configuration"
    )
    report.add_options(parser)
    args = parser.parse_args(arguments)
    if args.mae_path is not None and not (args.mae_path / FILE).exists():
        parser.error(f"--mae-path {args.mae_path} holds no {FILE}; expected a clone of facebookresearch/mae")
    return args


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="rounds before those")
    return parse(parser, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, store."""
    args = read_arguments(arguments)
    names = contenders(args.mae_path)
    rows = []
    for size in args.sizes:
        config = configure(size, args.batch, args.set)
        with tempfile.TemporaryDirectory() as folder:
            write_weights(config, Path(folder))
            for dtype in args.dtypes:
                print(f"{size} {dtype} ...", file=sys.stderr, flush=True)
                problem = Problem(config, dtype, args.batch, Path(folder), args.mae_path)
                found = measure(problem, size, names, args.modes, args.rounds, args.warmup)
                print(tables({"rows": found})["peers"], file=sys.stderr, flush=True)
                rows += found
    stored = report.store("peers", rows, args)
    print("\n\n".join([*tables(stored).values(), *judge(rows)]))
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    main()
