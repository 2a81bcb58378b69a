"""How much memory does a rank take: predicted by formula, measured on 2 gloo ranks, and what fits into a GPU?

    python benchmarks/memory.py [--steps 2] [key=value ...]     measured against `fastmim/memory.py`
    python benchmarks/memory.py --fits 80e9 [--images 64]       the largest ViT for each ZeRO stage and world size

Each variant has processes of its own, whose peak is counted above what imports hold.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

# Run as a script, Python looks here first, where `kernels.py` would pass for a package of that name.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from fastmim.kernels.masked_pixel_loss import masked_pixel_loss_reference
from torch import Tensor

from benchmarks import report
from benchmarks.gloo import SMALL, FixedBatch, Group, make_config
from benchmarks.markdown import table
from fastmim.memory import Memory, parameter_sizes, predict_memory
from fastmim.profiling.memory import held_bytes
from fastmim.ranks import Ranks

TOLERANCE = {"states": 0.02, "activations": 0.15, "peak": 0.2}
"""Largest relative error of the formula that the page calls a hit."""

PREDICTED = {"memory_fits"}
"""Tables that nothing was measured for."""

STAGE = "deepspeed.zero_optimization.stage"
VARIANTS = {
    **{f"ZeRO {stage}": [f"{STAGE}={stage}"] for stage in range(4)},
    "ZeRO 1, offload": [f"{STAGE}=1", "deepspeed.zero_optimization.offload_optimizer.device=cpu"],
    "ZeRO 1, activation checkpointing": [f"{STAGE}=1", "train.activation_checkpointing=true"],
    "ZeRO 1, eager loss": [f"{STAGE}=1"],
}
EAGER = "eager loss"

SIZES = {  # width, depth, heads, MLP ratio, patch: ViT (Dosovitskiy 2021, Zhai 2022, Chen 2022, Dehghani 2023)
    "base": (768, 12, 12, 4.0, 16),
    "large": (1024, 24, 16, 4.0, 16),
    "huge": (1280, 32, 16, 4.0, 14),
    "giant": (1408, 40, 16, 6144 / 1408, 14),
    "gigantic": (1664, 48, 16, 8192 / 1664, 14),
    "e": (1792, 56, 16, 15360 / 1792, 14),
    "22B": (6144, 48, 48, 4.0, 14),
}
RESERVE = 0.1
"""Share of a GPU's memory that `--fits` leaves to the CUDA context, libraries and fragments."""


def measure(words: list[str], steps: int, eager_loss: bool) -> dict[str, int | str]:
    """Bytes by kind on this rank, in a step after `steps` others."""
    device = Ranks().device
    memory = report.PeakMemory(device)
    name = "fastmim.targets.pixels.masked_pixel_loss"
    with mock.patch(name, masked_pixel_loss_reference) if eager_loss else nullcontext():
        fixed = FixedBatch(make_config(words))
        for _ in range(steps):
            loss = float(fixed.step())
        held = held_bytes(fixed.engine, fixed.ranks.device)
        # Read before a profiler of the forward pass takes memory of its own.
        peak = memory.bytes()
        # Of ZeRO-3, with what it gathered.
        kept, pending = kept_by(lambda: fixed.engine(fixed.batch)["loss"], device)
        fixed.engine.backward(pending)  # the ranks go on together
    return {
        **{"parameters": held["parameters"], "optimiser": held["optimiser"]},
        **{"forward": kept, "peak": peak, "precision": fixed.precision, "loss": loss},
    }


def kept_by(forward: Callable[[], Tensor], device: torch.device) -> tuple[int, Tensor]:
    """Bytes that a forward pass leaves behind for the backward pass, and its loss."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        loss = forward()
        return torch.cuda.memory_allocated(device) - before, loss
    with torch.profiler.profile(profile_memory=True) as profiler:
        loss = forward()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return sum(event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"), loss


def compare(name: str, args: argparse.Namespace) -> dict:
    """A row of one variant: predicted and measured, of the rank that took most."""
    overrides = args.overrides or SMALL
    words = [*overrides, *VARIANTS[name], f"optim.batch_size={args.ranks * args.images}"]
    eager = EAGER in name
    with Group(args.ranks, 1) as group:
        ranks = group.call(measure, words, args.steps, eager)
    measured = max(ranks, key=lambda rank: rank["peak"])
    config, precision = make_config(words), measured["precision"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    predicted = predict_memory(config, precision, args.ranks, fused_loss=not eager, on_cpu=device == "cpu")
    found = {
        "states": (predicted.states, measured["parameters"] + measured["optimiser"]),
        "activations": (predicted.activations + predicted.gathered, measured["forward"]),
        "peak": (predicted.peak, measured["peak"]),
    }
    return {
        "variant": name,
        "size": f"{' '.join(overrides)}, {args.images} images a rank, {args.ranks} ranks",
        "dtype": precision,
        "peak_memory_bytes": measured["peak"],
        **{f"{key}_predicted": ours for key, (ours, _) in found.items()},
        **{f"{key}_measured": theirs for key, (_, theirs) in found.items()},
        **{f"{key}_error": ours / theirs - 1 for key, (ours, theirs) in found.items()},
        "loss": measured["loss"],
        "kinds": vars(predicted),
    }


def fitting(limit: float, images: int, world_sizes: list[int]) -> list[dict]:
    """The largest size that fits, for each ZeRO stage and world size, with and without checkpointing."""
    rows = []
    numbers = {size: parameter_sizes(make_config(_size_words(size))) for size in SIZES}
    for stage in range(4):
        for world_size in world_sizes:
            for checkpointing in (False, True):
                found: tuple[str, Memory] | None = None
                for size in SIZES:
                    words = [
                        *_size_words(size),
                        f"{STAGE}={stage}",
                        f"optim.batch_size={images * world_size}",
                    ]
                    words.append(f"train.activation_checkpointing={str(checkpointing).lower()}")
                    predicted = predict_memory(make_config(words), "bf16", world_size, sizes=numbers[size])
                    if predicted.peak <= (1 - RESERVE) * limit:
                        found = size, predicted
                rows.append(
                    {
                        **{"limit": limit, "images": images, "stage": stage, "ranks": world_size},
                        **{"checkpointing": checkpointing, "largest": found[0] if found else None},
                        "peak": found[1].peak if found else None,
                    }
                )
    return rows


def _size_words(size: str) -> list[str]:
    width, depth, heads, ratio, patch = SIZES[size]
    return [
        *("model.size=null", f"model.width={width}", f"model.depth={depth}", f"model.heads={heads}"),
        *(f"model.mlp_ratio={ratio}", f"model.patch_size={patch}"),
    ]


def tables(stored: dict) -> dict[str, str]:
    """The page's tables of stored rows: `memory`, and `memory_fits` where there is one."""
    header = ["variant", "dtype"]
    for key in TOLERANCE:
        header += [f"{key}: predicted MiB", "measured", "error"]
    lines = []
    for row in stored["rows"]:
        line = [row["variant"], row["dtype"]]
        for key in TOLERANCE:
            line += [f"{row[f'{key}_{kind}'] / 2**20:,.1f}" for kind in ("predicted", "measured")]
            line.append(f"{row[f'{key}_error']:+.1%}")
        lines.append(line)
    return {"memory": table(header, lines), "memory_fits": fits_table(stored["fits"])}


def fits_table(rows: list[dict]) -> str:
    """A line for each ZeRO stage, a column for each world size."""
    worlds = sorted({row["ranks"] for row in rows})
    header = [
        "ZeRO",
        "activation checkpointing",
        *(f"{ranks} GPUs" if ranks > 1 else "1 GPU" for ranks in worlds),
    ]
    cells = {(row["stage"], row["checkpointing"], row["ranks"]): row for row in rows}
    lines = []
    for stage, checkpointing in dict.fromkeys(key[:2] for key in cells):
        line = [stage, "yes" if checkpointing else "no"]
        for ranks in worlds:
            row = cells[stage, checkpointing, ranks]
            line.append(f"{row['largest']} ({row['peak'] / 1e9:.0f} GB)" if row["largest"] else "none")
        lines.append(line)
    return table(header, lines)


def draw(path: Path, rows: list[dict]) -> None:
    """Predicted and measured peaks."""
    bars = {kind: [row[f"peak_{kind}"] / 2**20 for row in rows] for kind in ("predicted", "measured")}
    report.draw_bars(path, [row["variant"].replace(", ", ",\n") for row in rows], bars, "peak MiB of a rank")


def main(arguments: list[str] | None = None) -> None:
    """Measure and compare, or tell what fits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fits", type=float, metavar="BYTES", help="tell what fits, and measure nothing")
    parser.add_argument("--images", type=int, default=8, help="of a rank's micro-batch (default 8)")
    ranks = min(2, torch.cuda.device_count() or 2)
    parser.add_argument("--ranks", type=int, default=ranks, help="default 2, or 1 on one GPU")
    parser.add_argument("--steps", type=int, default=2, help="before a step is looked at (default 2)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 8, 64], help="world sizes of --fits")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    report.add_options(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"of mae_vit_base; default {' '.join(SMALL)}"
    )
    args = parser.parse_intermixed_args(arguments)
    if args.fits is not None:
        if args.json or args.plot:
            parser.error("--fits prints a table alone; expected neither --json nor --plot")
        print(fits_table(fitting(args.fits, args.images, args.worlds)))
        return
    rows = [compare(name, args) for name in args.variants]
    # What fits into the 80 GB of an A100 or H100, by the same formula.
    stored = report.store("memory", rows, args, fits=fitting(80e9, 64, args.worlds))
    print("\n\n".join(tables(stored).values()))
    for row in rows:
        for key, tolerance in TOLERANCE.items():
            if abs(row[f"{key}_error"]) > tolerance:
                print(f"{row['variant']}: {key} off by {row[f'{key}_error']:+.1%}; tolerance {tolerance:.0%}")
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    main()
