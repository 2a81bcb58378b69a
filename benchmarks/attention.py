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
from fastmim.kernels.short_attention import MAX_HEAD, MAX_TOKENS
from torch import Tensor

from benchmarks import harness, report
from benchmarks.markdown import table
from fastmim.models.attention import self_attend, xformers_refusal

SHAPES = {  # batch, tokens, heads, head width
    "quickstart encoder": (32, 37, 6, 32),
    "quickstart decoder": (32, 145, 4, 32),
    "ViT-B encoder": (16, 50, 12, 64),
    "MAE decoder": (16, 197, 16, 32),
}
CUDA_BATCH = 256
"""Images where fewer would leave the device waiting for the host."""
BASELINE = "sdpa"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of two backends' results, or gradients, over the largest value."""


def contender(qkv: Tensor, gradient: Tensor, backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """A forward and backward pass; returns the result and the gradient of qkv."""

    def run() -> tuple[Tensor, Tensor]:
        qkv.grad = None
        result = self_attend(qkv, backend).reshape(gradient.shape)
        result.backward(gradient)
        return result.detach(), qkv.grad

    return run


def require_same(contenders: dict[str, Callable[[], tuple[Tensor, Tensor]]], tolerance: float) -> None:
    """Refuse to compare backends whose results or gradients differ."""
    wanted = contenders[BASELINE]()
    for name, run in contenders.items():
        for what, own, other in zip(("result", "gradient"), run(), wanted, strict=True):
            off = float((own.float() - other.float()).abs().max() / other.float().abs().max())
            if not off <= tolerance:
                sys.exit(
                    f"the {what} of {name} differs from that of {BASELINE} by {off:.2g}; expected at most "
                    f"{tolerance:g}: no speed-up is told"
                )


def measure(
    label: str, precision: str, backends: list[str], rounds: int, device: str, rate: report.PeakRate
) -> list[dict]:
    """A row of each backend."""
    dtype = harness.DTYPES[precision]
    batch, tokens, heads, width = SHAPES[label]
    if device == "cuda":
        batch = CUDA_BATCH
        # A kernel of 16 bits, for what it is given in training.
        if dtype.itemsize == 2 and tokens <= MAX_TOKENS and width <= MAX_HEAD:
            backends = [*backends, "short"]
    qkv = torch.randn(batch, tokens, 3, heads, width, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(batch, tokens, heads * width, dtype=dtype, device=device)
    contenders = {backend: contender(qkv, gradient, backend) for backend in backends}
    require_same(contenders, TOLERANCE[dtype])
    samples = harness.time_in_turns(contenders, device, rounds)
    rate.measure(precision)
    # Scores and weighted values, and twice as much in the backward pass.
    flops = 3 * 4 * batch * heads * tokens * tokens * width
    return [
        report.timed_row(
            backend,
            f"{label} {batch, tokens, heads, width}",
            precision,
            samples[backend],
            baseline=samples[BASELINE],
            images=batch,
            flops=flops,
            baseline_flops=flops,
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
    rows, rate = [], report.PeakRate(torch.device(device))
    for precision in harness.computed_dtypes(device):
        backends = [BASELINE, "matmul"]
        if device == "cuda" and (refusal := xformers_refusal(precision)):
            print(f"xformers is left out: {refusal}", file=sys.stderr)
        elif device == "cuda":
            backends.append("xformers")
        for label in SHAPES:
            rows += measure(label, precision, backends, args.rounds, device, rate)
    stored = report.store("attention", rate.fill(rows), args, peak_flops=rate.samples)
    print(tables(stored)["attention"])
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    main()
