"""What does launch.py cost beyond its bare step: waiting for data, logs, checkpoints, Python?

    python benchmarks/end_to_end.py [--data FOLDER] [--rounds 30] [--steps 2] [--recipe mae_vit_base] [key=value ...]

launch.py trains on real files in a process of its own, with TensorBoard; the bare step is the same objective and
DeepSpeed engine on the first batch of that run, without loader, records or checkpoints. They take turns of `--steps`
steps, and whose turn it is not stands still: a machine whose speed drifts is as fast for the one as for the other.
Waiting for data and the time of a checkpoint are of a run of launch.py that nothing stops. A last table tells the
phases of a step by `fastmim profile`.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Run as a script, Python looks here first, where `kernels.py` would pass for a package of that name.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import harness, report
from benchmarks.gloo import FixedBatch
from benchmarks.launched import ROOT, Launched, first_loss, run_launch
from benchmarks.markdown import table
from benchmarks.photographs import write_photographs
from benchmarks.workers import Worker
from fastmim import recipes
from fastmim.config import Config
from fastmim.data.index import build_index
from fastmim.data.loader import Loader
from fastmim.objectives import build_objective
from fastmim.precision import choose_precision
from fastmim.ranks import Ranks
from fastmim.window import peak_memory_bytes

TARGET = 0.03
"""Largest share of a step that the engine is meant to add."""

WARMUP = 4
"""Steps before the clock starts, in both."""

RECORDED = 8
"""Steps at least of the run that nothing stops."""


def build_bare(words: list[str]) -> Callable[[], Tensor]:
    """The bare step on launch.py's first batch."""
    config = recipes.load(words[0], words[1:])
    return FixedBatch(config, _first_batch(config)).step


def seconds_of(step: Callable[[], Tensor], steps: int) -> float:
    """Seconds of so many steps; the device is done before and after."""
    started = time.perf_counter()
    for _ in range(steps):
        loss = step()
    loss.item()
    return time.perf_counter() - started


def memory_of(_: Callable[[], Tensor]) -> int:
    """Most bytes that this process held."""
    return peak_memory_bytes(Ranks().device)


def _first_batch(config: Config):
    index = build_index(config.require_source(), config.data, progress=False)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    loader = Loader(
        index,
        config.data,
        seed=config.train.seed,
        micro_batch=config.micro_batch(1),
        accumulation=config.optim.accumulation,
        repeats=config.mask.repeats,
        repeat_crops=config.mask.repeat_crops,
        rank=0,
        world_size=1,
        device=device,
    )
    batch = next(iter(loader))
    loader.close()
    return batch


def profile(words: list[str], steps: int) -> dict:
    """What `fastmim profile` tells of these steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastmim.cli", "profile", *words, "--out", folder]
        command += ["--json", f"{folder}/profile.json", "--steps", str(steps), "--warmup", str(WARMUP)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"fastmim profile ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return json.loads(Path(folder, "profile.json").read_text())


def compare(words: list[str], args: argparse.Namespace) -> list[dict]:
    """Rows of launch.py and the bare step, and what the difference is made of."""
    config, rate = recipes.load(words[0], words[1:]), report.PeakRate(Ranks().device)
    precision = choose_precision(config.train.precision, Ranks().device)
    wanted = first_loss(words)
    recorded = run_launch(words, max(RECORDED, 2 * args.steps), WARMUP)
    samples: dict[str, list[float]] = {"bare step": [], "launch.py": []}
    with Worker(build_bare, words) as bare, Launched(words, args.steps, WARMUP, args.rounds) as launched:
        report.require_same({"launch.py": wanted, "bare step": bare.step(compiled=True)}, 1e-3)
        bare_turn = functools.partial(
            bare.measure_step, functools.partial(seconds_of, steps=args.steps), compiled=True
        )
        for _ in range(-(-(WARMUP - 1) // args.steps)):
            bare_turn()
        turns = {"bare step": bare_turn, "launch.py": launched.turn}
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds} ...", file=sys.stderr, flush=True)
            # The one that was second is first: what came before a turn slows both alike.
            for name in list(turns)[:: 1 if number % 2 else -1]:
                samples[name].append(turns[name]() / args.steps)
            rate.measure(precision)
        memory = {"bare step": bare.measure_step(memory_of), "launch.py": recorded["memory"]}
    batch, flops = config.optim.batch_size, build_objective(config).step_flops() * config.optim.batch_size
    rows = [
        report.timed_row(
            name,
            f"{words[0]}, batch {batch}",
            precision,
            seconds,
            baseline=samples["bare step"],
            images=batch,
            flops=flops,
            baseline_flops=flops,
            peak_memory=memory[name],
        )
        for name, seconds in samples.items()
    ]
    rate.fill(rows)
    rows[1] |= {
        "overhead": 1 / rows[1]["ratio"] - 1,
        "overhead_range": [1 / fast - 1 for fast in reversed(rows[1]["ratio_range"])],
        "data_wait": recorded["data_wait"],
        "checkpoint_s": recorded["checkpoint_s"],
        # Over the recipe's own interval, or the default one.
        "checkpoint_share": recorded["checkpoint_s"] / (60 * (config.checkpoint.every_minutes or 30)),
    }
    return rows


def interval(bare: dict, row: dict) -> str:
    """Where the median of what a row takes more than the bare step lies; a dash where too few rounds tell."""
    more = [ratio - 1 for ratio in harness.ratios(row["samples"], bare["samples"])]
    found = harness.median_interval(more) if row is not bare else None
    return "–" if found is None else f"{found[0]:+.1%} to {found[1]:+.1%}"


def tables(stored: dict) -> dict[str, str]:
    """The page's tables of stored rows: `end_to_end` and `end_to_end_phases`."""
    header = ["what", "size", "dtype", "ms a step", "p20–p80", "images/s", "over the bare step"]
    header += ["its 95 % interval", "rounds", "waits for data", "checkpoints, amortised"]
    lines = []
    for row in stored["rows"]:
        shares = [
            f"{row[key]:+.2%}" if key in row else "–" for key in ("overhead", "data_wait", "checkpoint_share")
        ]
        shares[1:1] = [interval(stored["rows"][0], row), str(len(row["samples"]))]
        lines.append(
            [
                *(row["variant"], row["size"], row["dtype"], f"{1e3 * row['median_s']:.1f}"),
                f"{1e3 * row['p20_s']:.1f}–{1e3 * row['p80_s']:.1f}",
                *(f"{row['images_per_s']:.1f}", *shares),
            ]
        )
    told = stored["profile"]
    phases = [
        [name, f"{1e3 * seconds:.2f}", f"{seconds / told['step_seconds']:.1%}"]
        for name, seconds in told["seconds"].items()
    ]
    return {
        "end_to_end": table(header, lines),
        "end_to_end_phases": table(["phase", "ms", "share of a step"], phases),
    }


def draw(path: Path, told: dict) -> None:
    """The phases of a step."""
    phases = told["seconds"]
    report.draw_bars(
        path, list(phases), {"launch.py": [1e3 * value for value in phases.values()]}, "ms of a step"
    )


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a source of images (default: photographs written for it)")
    parser.add_argument("--recipe", default="mae_vit_base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30, help="turns of each (default 30)")
    parser.add_argument("--steps", type=int, default=2, help="of a turn (default 2)")
    report.add_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the recipe")
    args = parser.parse_intermixed_args(arguments)
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}; expected at least 1")
    os.chdir(ROOT)
    source = args.data or str(write_photographs(Path("data/benchmark/q90"), 512, 90))
    words = [args.recipe, f"data.source={source}", f"optim.batch_size={args.batch}", *args.overrides]
    if (passes := recipes.load(words[0], words[1:]).optim.accumulation) > 1:
        parser.error(f"optim.accumulation={passes}; expected 1, since the bare step has one batch")
    rows = compare(words, args)
    told = profile(words, max(RECORDED, args.steps))
    stored = report.store("end_to_end", rows, args, profile=told)
    print("\n\n".join(tables(stored).values()))
    print(
        f"launch.py takes {rows[1]['overhead']:+.2%} more than its bare step ({interval(*rows)}), and "
        f"{rows[1]['checkpoint_share']:.2%} for checkpoints; target at most {TARGET:.0%}"
    )
    if args.plot:
        draw(args.plot, told)


if __name__ == "__main__":
    main()
