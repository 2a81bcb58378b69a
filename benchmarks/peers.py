"""How fast, and in how much memory, is one optimiser step of the same MAE here and elsewhere?

    python benchmarks/peers.py [--sizes small base] [--dtypes fp32] [--mae-path CLONE] [--json PATH] [--plot FILE]

This engine, `transformers`, `lightly` where it is installed (`pip install -e ".[bench]"`) and, from a user's clone,
facebookresearch/mae; each eager and compiled. See `contenders.py` for what each is given.
"""

import argparse
import functools
import importlib.util
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

# Run as a script, Python looks here first, where this file would pass for a package called `kernels`.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, markdown, report
from benchmarks.contenders import CONTENDERS, IMPORTS, Problem, write_weights
from benchmarks.peers_published import FILE
from benchmarks.workers import Worker
from fastmim import recipes
from fastmim.config import MODEL_SIZES, Config
from fastmim.objectives import build_objective
from fastmim.ranks import Ranks

TOLERANCE = {"bf16": 5e-3, "fp32": 1e-4}
"""Of the losses, relative: two steps, so that the second sees the first's update."""
OURS = "fastmim"
MODES = ("eager", "compiled")
Key = tuple[str, str]
"""A contender's name, and its mode."""
TARGETS = {"ratio": 1.25, "memory": 0.75}
"""Times the fastest peer's fastest mode, and of its peak memory, that are aimed at on a CPU."""


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


def clone_commit(mae_path: Path | None) -> str | None:
    """Which commit a clone of facebookresearch/mae is at."""
    if mae_path is None:
        return None
    command = ["git", "-C", str(mae_path), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def worker_of(name: str, problem: Problem) -> Worker:
    """A process that makes the steps of a contender."""
    build = CONTENDERS[name]
    return Worker(build, problem, imports=IMPORTS[build])


def try_out(problem: Problem, name: str, mode: str) -> tuple[list[float], int]:
    """Losses of two steps of a contender in a fresh process, and its peak memory in bytes: in the second on a GPU."""
    with worker_of(name, problem) as worker:
        losses = [worker.step(mode == "compiled")]
        worker.forget_peak()
        losses.append(worker.step(mode == "compiled"))
        return losses, worker.peak_memory()


def measure(
    problem: Problem,
    size: str,
    names: list[str],
    modes: list[str],
    rounds: int,
    warmup: int,
    rate: report.PeakRate,
) -> list[dict]:
    """The rows of a size and dtype: memory is measured and losses are compared, in every mode; then time."""
    found = {(name, mode): try_out(problem, name, mode) for mode in modes for name in names}
    for step in range(2):
        losses = {", ".join(key): each[step] for key, (each, _) in found.items()}
        report.require_same(losses, TOLERANCE[problem.precision])
    rate.measure(problem.precision)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker_of(name, problem)) for name in names}
        steps = {
            (name, mode): functools.partial(workers[name].step, mode == "compiled") for name, mode in found
        }
        # By the clock on every device: a worker answers when its device is done.
        samples = harness.time_in_turns(steps, "cpu", rounds, warmup)
    rate.measure(problem.precision)
    flops = build_objective(problem.config).step_flops() * problem.batch
    memory = {key: peak for key, (_, peak) in found.items()}
    return rate.fill(compare(samples, memory, size, problem.precision, problem.batch, flops))


def compare(
    samples: dict[Key, list[float]],
    memory: dict[Key, int],
    size: str,
    dtype: str,
    batch: int,
    flops: float,
) -> list[dict]:
    """Rows of what was measured. A peer is compared with the one of the least median, this engine with the one that
    it beats by least.

    Args:
        samples: seconds by name and mode.
        memory: bytes, likewise.
        size, dtype: of the model.
        batch: images in a step.
        flops: of this engine's step, which peers are given too: they compute a little more.
    """
    peers = [key for key in samples if key[0] != OURS]
    fastest = min(peers, key=lambda key: harness.summarise(samples[key])["median_us"])

    def nearest(key: Key) -> Key:
        if key[0] != OURS:
            return fastest
        return min(peers, key=lambda peer: harness.ratio(samples[peer], samples[key]))

    return [
        report.timed_row(
            ", ".join(key),
            size,
            dtype,
            seconds,
            baseline=samples[nearest(key)],
            images=batch,
            flops=flops,
            baseline_flops=flops,
            peak_memory=memory[key],
            memory_ratio=memory[key] / memory[nearest(key)],
            name=key[0],
            against=", ".join(nearest(key)),
        )
        for key, seconds in samples.items()
    ]


def interval(rows: list[dict], row: dict) -> str:
    """Where the median of a row's ratio lies with 95 % confidence: a dash for too few rounds, or beside itself."""
    like = {
        other["variant"]: other for other in rows if all(other[key] == row[key] for key in ("size", "dtype"))
    }
    other = like[row["against"]]
    found = harness.median_interval(harness.ratios(other["samples"], row["samples"]))
    return "–" if found is None or other is row else "–".join(f"{limit:.2f}" for limit in found)


def tables(stored: dict) -> dict[str, str]:
    """The page's table of stored rows: `peers`."""
    header = ["implementation", "size", "dtype", "median ms", "p20–p80", "images/s", "MFU", "peak MiB"]
    header += ["× the fastest peer", "its 95 % interval", "of a round", "of its memory", "which is"]
    lines = [
        [
            *(row[key] for key in ("variant", "size", "dtype")),
            f"{1e3 * row['median_s']:.0f}",
            f"{1e3 * row['p20_s']:.0f}–{1e3 * row['p80_s']:.0f}",
            f"{row['images_per_s']:.1f}",
            f"{row['mfu']:.0%}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
            f"{row['ratio']:.2f}",
            interval(stored["rows"], row),
            "–".join(f"{limit:.2f}" for limit in row["ratio_range"]),
            f"{row['memory_ratio']:.2f}",
            row["against"],
        ]
        for row in stored["rows"]
    ]
    return {"peers": markdown.table(header, lines)}


def judge(rows: list[dict]) -> list[str]:
    """A line for each size, dtype and mode of this engine: what it reaches of the targets."""
    return [
        f"{row['size']} {row['dtype']}: {row['variant']} is {row['ratio']:.2f} times as fast as {row['against']} in "
        f"{row['memory_ratio']:.2f} of its memory; targets {TARGETS['ratio']} and {TARGETS['memory']}"
        for row in rows
        if row["name"] == OURS
    ]


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
        choices=harness.DTYPES,
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
    rows, rate = [], report.PeakRate(Ranks().device)
    for size in args.sizes:
        config = configure(size, args.batch, args.set)
        with tempfile.TemporaryDirectory() as folder:
            write_weights(config, Path(folder))
            for dtype in args.dtypes:
                print(f"{size} {dtype} ...", file=sys.stderr, flush=True)
                problem = Problem(config, dtype, args.batch, Path(folder), args.mae_path)
                found = measure(problem, size, names, args.modes, args.rounds, args.warmup, rate)
                print(tables({"rows": found})["peers"], file=sys.stderr, flush=True)
                rows += found
    facts = {"peak_flops": rate.samples, "published": clone_commit(args.mae_path)}
    stored = report.store("peers", rate.fill(rows), args, **facts)
    print("\n\n".join([*tables(stored).values(), *judge(rows)]))
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    main()
