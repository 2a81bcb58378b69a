"""What does an encoder save that sees visible patches only?

    python benchmarks/visible_only.py [--sizes base large huge] [--curve base] [--ratios 0 0.25 0.5 0.75 0.9]

Three steps of this engine are compared, forward, backward and optimiser: with mask tokens in the encoder, visible
patches only, and visible patches only with a decoder of one block (MAE, Tables 1c and 2). Every turn is a fresh
process, so that no contender holds another's memory: a round builds each, and times its steps after a warm-up.
`--curve` repeats it at other mask ratios.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

# Run as a script, Python looks here first, where `kernels.py` would pass for a package of that name.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib.figure import Figure

from benchmarks import harness, markdown, report
from benchmarks.contenders import IMPORTS, Problem, fastmim
from benchmarks.workers import Worker
from fastmim import recipes
from fastmim.config import Config
from fastmim.masking import mask_from_order
from fastmim.objectives import build_objective
from fastmim.ranks import Ranks

BASELINE, VISIBLE, SHALLOW = "mask tokens in the encoder", "visible only", "visible only, decoder of 1 block"
VARIANTS = {
    BASELINE: ["objective.mask_token_in_encoder=true"],
    VISIBLE: [],
    SHALLOW: ["objective.decoder_depth=1"],
}
PAPER = {("large", VISIBLE): 2.8, ("large", SHALLOW): 3.7, ("huge", VISIBLE): 3.5, ("huge", SHALLOW): 4.1}
"""Speed-ups of MAE's Table 2: 800 epochs on 128 TPU-v3 cores."""
BATCHES = {"base": 16, "large": 16, "huge": 8}
"""Images in a step; `fastmim.memory` predicts up to 11 GB for the costliest variant."""
CUDA_BATCHES = {"base": 512, "large": 256, "huge": 128}
"""The same where fewer would leave the device waiting for the host: `fastmim.memory` predicts up to 57 GB in bf16."""
MAIN_RATIO = 0.75
TARGET = 0.95
"""Speed-up over FLOP ratio that is aimed at for ViT-B and ViT-L."""
TOLERANCE = 1e-4


def configure(size: str, ratio: float, batch: int, overrides: list[str]) -> Config:
    """The MAE of a size. A ratio of 0 removes one patch: with none there is no loss."""
    patch = 14 if size == "huge" else 16
    words = [f"model.size={size}", f"model.patch_size={patch}", f"optim.batch_size={batch}"]
    words += ["deepspeed.zero_optimization.stage=1"]
    patches = recipes.override([*words, *overrides]).grid
    least = 0.5 / (patches[0] * patches[1])
    return recipes.override([*words, f"mask.ratio={max(ratio, least)}", *overrides])


def batch_of(size: str, args: argparse.Namespace) -> int:
    """Images in a step of a size: what was asked for, or as many as suit the device."""
    return args.batch or (CUDA_BATCHES if Ranks().device.type == "cuda" else BATCHES)[size]


def configs_of(size: str, ratio: float, batch: int, overrides: list[str]) -> dict[str, Config]:
    """The configuration of each variant."""
    return {name: configure(size, ratio, batch, [*overrides, *own]) for name, own in VARIANTS.items()}


def losses_alike(configs: dict[str, Config]) -> list[dict[str, float]]:
    """Losses that have to agree, of one set of weights, although the variants differ by design.

    Where no patch is removed, the first two encode and decode the same tokens: their losses over all patches are
    equal. A decoder whose blocks behind the first add nothing is one of a single block.

    Args:
        configs: of each variant.
    """
    config = configs[VISIBLE]
    generator = torch.Generator().manual_seed(0)
    shape = (1, *config.data.image_size, config.data.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    torch.manual_seed(0)
    visible = build_objective(config).requires_grad_(False)
    state = visible.state_dict()
    ids = torch.arange(visible.patches)[None]
    mask = mask_from_order(ids, visible.patches)

    def loss(objective: torch.nn.Module) -> float:
        return float(objective.head(objective.features(images, mask, ids), images, ids).loss)

    def other(variant: str) -> float:
        objective = build_objective(configs[variant]).requires_grad_(False)
        objective.load_state_dict(state, strict=False)
        return loss(objective)

    whole = {VISIBLE: loss(visible), BASELINE: other(BASELINE)}
    for block in visible.decoder.blocks.layers[1:]:
        for linear in (block.attn.proj, block.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    return [whole, {f"{VISIBLE}, idle blocks": loss(visible), SHALLOW: other(SHALLOW)}]


def take_turn(problem: Problem, steps: int) -> tuple[list[float], int]:
    """Seconds of each step after a warm-up, and peak memory in bytes, of a fresh process."""
    with Worker(fastmim, problem, imports=IMPORTS[fastmim]) as worker:
        worker.step()
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            worker.step()
            seconds.append(time.perf_counter() - started)
        return seconds, worker.peak_memory()


def measure(
    size: str, ratio: float, args: argparse.Namespace, rate: report.PeakRate, rounds: int
) -> list[dict]:
    """The rows of a size and mask ratio, from so many turns of each."""
    batch = batch_of(size, args)
    turns: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    memory = dict.fromkeys(VARIANTS, 0)
    problems, flops = {}, {}
    for name, config in configs_of(size, ratio, batch, args.set).items():
        problems[name] = Problem(config, args.dtype, batch)
        with torch.device("meta"):
            flops[name] = batch * build_objective(config).step_flops()
    for _ in range(rounds):
        for name, problem in problems.items():
            seconds, peak = take_turn(problem, args.steps)
            turns[name].append(seconds)
            memory[name] = max(memory[name], peak)
        rate.measure(args.dtype)
    # A turn is one sample: what slows a process slows all of its steps.
    samples = {name: [median(seconds) for seconds in each] for name, each in turns.items()}
    return [
        report.timed_row(
            name,
            size,
            args.dtype,
            samples[name],
            baseline=samples[BASELINE],
            images=batch,
            flops=flops[name],
            baseline_flops=flops[BASELINE],
            peak_memory=memory[name],
            turns=turns[name],
            mask_ratio=ratio,
            paper=PAPER.get((size, name)),
        )
        for name in VARIANTS
    ]


def tables(stored: dict) -> dict[str, str]:
    """The page's tables of stored rows: `visible_only`, at the paper's ratio, and `visible_only_curve`."""
    main = [row for row in stored["rows"] if row["mask_ratio"] == MAIN_RATIO]
    for row in main:
        row["paper's speed-up"] = row["paper"] or "–"
    curve = curve_of(stored["rows"])
    ratios = list(dict.fromkeys(row["mask_ratio"] for row in curve))
    lines = []
    for name in dict.fromkeys(row["variant"] for row in curve if row["variant"] != BASELINE):
        cells = [row for row in curve if row["variant"] == name]
        lines.append([name, "speed-up", *(f"{row['ratio']:.2f}" for row in cells)])
        lines.append([name, "speed-up ÷ FLOP ratio", *(f"{row['efficiency']:.2f}" for row in cells)])
    return {
        "visible_only": report.timed_table(main, ("paper's speed-up",)),
        "visible_only_curve": markdown.table(["variant", "removed:", *(f"{r:.0%}" for r in ratios)], lines),
    }


def curve_of(rows: list[dict]) -> list[dict]:
    """The rows of the size that was measured at other mask ratios too, from the least removed to the most."""
    sizes = {row["size"] for row in rows if row["mask_ratio"] != MAIN_RATIO}
    return sorted((row for row in rows if row["size"] in sizes), key=lambda row: row["mask_ratio"])


def judge(rows: list[dict]) -> list[str]:
    """A line for each size at the paper's ratio."""
    return [
        f"{row['size']}, {row['variant']}: speed-up / FLOP ratio {row['efficiency']:.2f}, at least "
        f"{row['ratio_range'][0] / row['flop_ratio']:.2f} in a round; target {TARGET}"
        for row in rows
        if row["variant"] != BASELINE and row["mask_ratio"] == MAIN_RATIO
    ]


def draw(path: Path, rows: list[dict]) -> None:
    """Speed-up against mask ratio, measured and as the FLOPs would have it."""
    figure = Figure(figsize=(6.5, 4), layout="tight")
    axis = figure.subplots()
    for colour, name in enumerate((VISIBLE, SHALLOW)):
        curve = [row for row in curve_of(rows) if row["variant"] == name]
        ratios, measured, analytic = (
            [row[key] for row in curve] for key in ("mask_ratio", "ratio", "flop_ratio")
        )
        axis.plot(ratios, measured, "o-", color=f"C{colour}", label=name)
        axis.plot(ratios, analytic, "--", color=f"C{colour}", label=f"{name}, FLOPs")
    axis.axhline(1, color="0.7", linewidth=0.8)
    axis.set_xlabel("mask ratio")
    axis.set_ylabel(f"speed-up over {BASELINE}", fontsize=9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--curve", choices=BATCHES, default="base", help="size of the curve (default base)")
    parser.add_argument(
        "--ratios",
        nargs="*",
        type=float,
        default=[0, 0.25, 0.5, 0.75, 0.9],
        help="of the curve; none: no curve",
    )
    parser.add_argument(
        "--batch", type=int, help=f"images in a step (default {BATCHES}; on CUDA {CUDA_BATCHES})"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument(
        "--curve-rounds", type=int, default=1, help="at other ratios than the paper's (default 1)"
    )
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn (default 2)")
    parser.add_argument(
        "--dtype",
        choices=harness.DTYPES,
        default=next(iter(harness.computed_dtypes(Ranks().device.type))),
        help="default: bf16 where the hardware computes it",
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration")
    report.add_options(parser)
    args = parser.parse_args(arguments)
    if any(not 0 <= ratio < 1 for ratio in args.ratios):
        parser.error(f"--ratios {args.ratios}; expected numbers of 0 to below 1")
    if args.plot and not args.ratios:
        parser.error("--plot draws the curve; expected --ratios")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, store."""
    args = read_arguments(arguments)
    jobs = [(size, MAIN_RATIO, args.rounds) for size in args.sizes]
    jobs += [
        (args.curve, ratio, args.curve_rounds)
        for ratio in args.ratios
        if (args.curve, ratio) not in {(size, MAIN_RATIO) for size in args.sizes}
    ]
    rows, same, rate = [], {}, report.PeakRate(Ranks().device)
    for size, ratio, rounds in jobs:
        print(f"{size}, {ratio:.0%} removed ...", file=sys.stderr, flush=True)
        if size not in same:
            configs = configs_of(size, MAIN_RATIO, batch_of(size, args), args.set)
            same[size] = report.in_child(losses_alike, configs)
            for losses in same[size]:
                report.require_same(losses, TOLERANCE)
        rows += measure(size, ratio, args, rate, rounds)
    facts = {"same_losses": same, "peak_flops": rate.samples}
    stored = report.store("visible_only", rate.fill(rows), args, **facts)
    print("\n\n".join([*tables(stored).values(), "\n".join(judge(rows))]))
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    main()
