"""Which attention is fastest on this machine, forward and backward?

    python benchmarks/attention.py [--rounds 10]

A sample is one forward and backward pass, from and to the packed qkv that a transformer block holds.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

# Run as a script, Python looks here first, where `kernels.py` would pass for a package of that name.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import harness, report
from benchmarks.markdown import table
from fastmim.flops import measure_peak_flops
from fastmim.models.attention import attend

SHAPES = {  # batch, tokens, heads, head width
    "quickstart encoder": (32, 37, 6, 32),
    "quickstart decoder": (32, 145, 4, 32),
    "ViT-B encoder": (16, 50, 12, 64),
    "MAE decoder": (16, 197, 16, 32),
}
BASELINE = "sdpa"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of two backends' results, over the largest value."""


def contender(qkv: Tensor, gradient: Tensor, backend: str) -> Callable[[], Tensor]:
    """A forward and backward pass; returns the result."""

    def run() -> Tensor:
        qkv.grad = None
        result = attend(*qkv.unbind(2), backend).reshape(gradient.shape)
        result.backward(gradient)
        return result.detach()

    return run


def require_same(contenders: dict[str, Callable[[], Tensor]], tolerance: float) -> None:
    """Refuse to compare backends whose results differ."""
    wanted = contenders[BASELINE]().float()
    for name, run in contenders.items():
        off = float((run().float() - wanted).abs().max() / wanted.abs().max())
        if off > tolerance:
            sys.exit(
                f"{name} differs from {BASELINE} by {off:.2g}; expected at most {tolerance:g}: no speed-up is told"
            )


def measure(
    label: str, dtype: torch.dtype, backends: list[str], rounds: int, device: str, peak: float
) -> list[dict]:
    """A row of each backend; `peak` is the FLOP/s of a large product."""
    batch, tokens, heads, width = SHAPES[label]
    qkv = torch.randn(batch, tokens, 3, heads, width, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(batch, tokens, heads * width, dtype=dtype, device=device)
    contenders = {backend: contender(qkv, gradient, backend) for backend in backends}
    require_same(contenders, TOLERANCE[dtype])
    samples = harness.time_in_turns(contenders, device, rounds)
    # Scores and weighted values, and twice as much in the backward pass.
    flops = 3 * 4 * batch * heads * tokens * tokens * width
    return [
        report.timed_row(
            backend,
            f"{label} {SHAPES[label]}",
            str(dtype).removeprefix("torch."),
            samples[backend],
            baseline=samples[BASELINE],
            images=batch,
            flops=flops,
            baseline_flops=flops,
            peak_flops=peak,
        )
        for backend in backends
    ]


def tables(stored: dict) -> dict[str, str]:
    """The page's table of stored rows: `attention`."""
    lines = [
        [
            *(row["size"], row["dtype"], row["variant"], f"{1e3 * row['median_s']:.2f}"),
            f"{1e3 * row['p20_s']:.2f}–{1e3 * row['p80_s']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for row in stored["rows"]
    ]
    return {"attention": table(["shape", "dtype", "backend", "median ms", "p20–p80", "sdpa / this"], lines)}


def draw(path: Path, rows: list[dict]) -> None:
    """Times over sdpa's, a group for each shape and dtype."""
    groups = list(dict.fromkeys(f"{row['size']}\n{row['dtype']}" for row in rows))
    backends = list(dict.fromkeys(row["variant"] for row in rows))
    bars = {name: [row["ratio"] for row in rows if row["variant"] == name] for name in backends}
    report.draw_bars(path, groups, bars, "times as fast as sdpa")


def main(arguments: list[str] | None = None) -> None:
    """Time, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    report.add_options(parser)
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = [BASELINE, "matmul"] + (["xformers"] if device == "cuda" else [])
    rows = []
    for dtype in harness.computed_dtypes(device).values():
        peak = measure_peak_flops(torch.device(device), dtype)
        for label in SHAPES:
            rows += measure(label, dtype, backends, args.rounds, device, peak)
    stored = report.store("attention", rows, args)
    print(tables(stored)["attention"])
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    main()
