"""What does launch.py cost beyond its bare step: waiting for data, logs, checkpoints, Python?

    python benchmarks/end_to_end.py [--data FOLDER] [--rounds 3] [--steps 12] [--recipe mae_vit_base] [key=value ...]

launch.py trains on real files in a process of its own, with TensorBoard, and its lines are timed as they come; the bare
step is the same objective and DeepSpeed engine on the first batch of that run, without loader, records or checkpoints.
Both take turns in fresh processes. A last table tells the phases of a step by `fastmim profile`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

# Run as a script, Python looks here first, where `kernels.py` would pass for a package of that name.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import report
from benchmarks.gloo import FixedBatch, Group
from benchmarks.markdown import table
from benchmarks.photographs import write_photographs
from fastmim import recipes
from fastmim.config import Config
from fastmim.data.index import build_index
from fastmim.data.loader import Loader
from fastmim.metrics import read_records
from fastmim.ranks import Ranks
from fastmim.window import peak_memory_bytes

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.03
"""Largest share of a step that the engine is meant to add."""

WARMUP = 4
"""Steps before the clock starts, in both."""


def run_launch(words: list[str], steps: int, warmup: int = WARMUP) -> dict[str, float]:
    """Train by launch.py: `warmup` steps, then `steps` between two records, with a checkpoint among them.

    Args:
        words: the recipe, then its `key=value` overrides.
        steps: how many are timed; even.
        warmup: how many come before.

    Returns:
        Seconds of a step by the records' own count, which leaves saving out; by the clock of who reads the lines,
        seconds of one checkpoint; share of time that the loop waited for data; most bytes that the process held; the
        first record's loss, which is a mean over `steps` / 2 steps.
    """
    every = steps // 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "launch.py", "--config", *words, f"output={folder}/run"]
        command += [f"log.every_steps={every}", "log.reconstruct_every_steps=null", "log.images=null"]
        # Records come at multiples of `every`: warm-up ends at the first that is late enough.
        first = -(-warmup // every) * every
        command += [f"train.max_steps={first + steps + 1}", f"checkpoint.every_steps={first + every}"]
        command += ["checkpoint.every_minutes=null"]  # one checkpoint is timed
        seen: dict[int, float] = {}
        lines = []
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout or ():
                lines.append(line)
                if found := re.search(r" step (\d+)/", line):
                    seen[int(found[1])] = time.perf_counter()
        if process.returncode:
            sys.exit(f"launch.py ended with {process.returncode}\n{''.join(lines)}")
        records = {record["step"]: record for record in read_records(Path(folder) / "run" / "metrics.jsonl")}
    config = recipes.load(words[0], words[1:])
    window = [records[first + every], records[first + steps]]
    batch = config.optim.batch_size
    step = sum(batch / record["images_per_s"] for record in window) / len(window)
    elapsed = seen[first + steps] - seen[first]
    return {
        "step_s": step,
        "checkpoint_s": max(0.0, elapsed - steps * step),
        "data_wait": sum(record["data_wait"] for record in window) / len(window),
        "memory": window[-1]["peak_memory_bytes"],
        "loss": records[every]["loss"],
    }


def run_bare(words: list[str], steps: int) -> dict[str, float]:
    """The bare step on launch.py's first batch: mean seconds, most bytes, FLOPs, and the loss of the first."""
    config = recipes.load(words[0], words[1:])
    fixed = FixedBatch(config, _first_batch(config))
    loss = float(fixed.step())
    for _ in range(WARMUP - 1):
        fixed.step()
    fixed.synchronise()
    started = time.perf_counter()
    for _ in range(steps):
        fixed.step()
    fixed.synchronise()
    return {
        "step_s": (time.perf_counter() - started) / steps,
        "loss": loss,
        "precision": fixed.precision,
        "memory": peak_memory_bytes(fixed.ranks.device),
        "flops": config.optim.batch_size * fixed.objective.step_flops(),
    }


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
    threads = len(os.sched_getaffinity(0)) if "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads()
    launched, bare, rate = [], [], report.PeakRate(Ranks().device)
    wanted = run_launch(words, steps=2, warmup=1)["loss"]  # the first step's alone
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds} ...", file=sys.stderr, flush=True)
        launched.append(run_launch(words, args.steps))
        with Group(1, threads) as group:
            bare.append(group.call(run_bare, words, args.steps)[0])
        report.require_same({"launch.py": wanted, "bare step": bare[-1]["loss"]}, 1e-3)
        rate.measure(bare[-1]["precision"])
    config = recipes.load(words[0], words[1:])
    batch, floor = config.optim.batch_size, [one["step_s"] for one in bare]
    rows = [
        report.timed_row(
            name,
            f"{words[0]}, batch {batch}",
            bare[0]["precision"],
            [one["step_s"] for one in measured],
            baseline=floor,
            images=batch,
            flops=bare[0]["flops"],
            baseline_flops=bare[0]["flops"],
            peak_memory=max(one["memory"] for one in measured),
        )
        for name, measured in (("bare step", bare), ("launch.py", launched))
    ]
    rate.fill(rows)
    step = median(one["step_s"] for one in launched)
    saved = median(one["checkpoint_s"] for one in launched)
    rows[1] |= {
        "overhead": 1 / rows[1]["ratio"] - 1,
        "overhead_range": [1 / fast - 1 for fast in reversed(rows[1]["ratio_range"])],
        "rounds": launched,
        "data_wait": median(one["data_wait"] for one in launched),
        "checkpoint_s": saved,
        # Over the recipe's own interval, or the default one.
        "checkpoint_share": saved / (60 * (config.checkpoint.every_minutes or 30)),
        "step_s": step,
    }
    return rows


def tables(stored: dict) -> dict[str, str]:
    """The page's tables of stored rows: `end_to_end` and `end_to_end_phases`."""
    header = [
        "what",
        "size",
        "dtype",
        "ms a step",
        "p20–p80",
        "images/s",
        "over the bare step",
        "of a round",
        "waits for data",
    ]
    header += ["checkpoints, amortised"]
    lines = []
    for row in stored["rows"]:
        shares = [
            f"{row[key]:+.2%}" if key in row else "–" for key in ("overhead", "data_wait", "checkpoint_share")
        ]
        span = [f"{end:+.1%}" for end in row.get("overhead_range", ())]
        shares.insert(1, " to ".join(span) or "–")
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of a sample, even (default 12)")
    report.add_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the recipe")
    args = parser.parse_intermixed_args(arguments)
    if args.steps % 2 or args.steps < 2:
        parser.error(f"--steps {args.steps}; expected an even number: a sample is two records")
    os.chdir(ROOT)
    source = args.data or str(write_photographs(Path("data/benchmark/q90"), 512, 90))
    words = [args.recipe, f"data.source={source}", f"optim.batch_size={args.batch}", *args.overrides]
    rows = compare(words, args)
    told = profile(words, args.steps)
    stored = report.store("end_to_end", rows, args, profile=told)
    print("\n\n".join(tables(stored).values()))
    total = rows[1]["overhead"] + rows[1]["checkpoint_share"]
    print(f"launch.py takes {total:+.2%} more than its bare step; target at most {TARGET:.0%}")
    if args.plot:
        draw(args.plot, told)


if __name__ == "__main__":
    main()
