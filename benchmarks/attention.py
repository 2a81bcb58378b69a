"""Which attention is fastest on this machine, forward and backward?

    python benchmarks/attention.py [--rounds 10] [--json PATH]

Contenders take turns within each round, so a drift of the machine's speed cancels in the ratios.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from fastmim.models.attention import attend

SHAPES = {  # batch, tokens, heads, head width
    "quickstart encoder": (32, 37, 6, 32),
    "quickstart decoder": (32, 145, 4, 32),
    "ViT-B encoder": (16, 50, 12, 64),
    "MAE decoder": (16, 197, 16, 32),
}


def time_step(shape: tuple[int, int, int, int], dtype: torch.dtype, backend: str, device: str) -> float:
    """Seconds of one forward and backward, from and to the packed qkv that a transformer block holds."""
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(batch, tokens, heads * width, dtype=dtype, device=device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    attend(*qkv.unbind(2), backend).reshape(batch, tokens, heads * width).backward(gradient)
    synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Print a Markdown table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = ["sdpa", "matmul"] + (["xformers"] if device == "cuda" else [])
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    machine = {"device": name, "cores": os.cpu_count(), "torch": torch.__version__}
    rows = []
    print("| shape | dtype | backend | median ms | sdpa / this |\n|---|---|---|---|---|")
    for label, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            samples = {backend: [] for backend in backends}
            for round_number in range(args.rounds + 2):
                for backend in backends:
                    seconds = time_step(shape, dtype, backend, device)
                    if round_number >= 2:
                        samples[backend].append(seconds)
            for backend in backends:
                ratios = [a / b for a, b in zip(samples["sdpa"], samples[backend], strict=True)]
                median, ratio = statistics.median(samples[backend]), statistics.median(ratios)
                kind = str(dtype).removeprefix("torch.")
                print(f"| {label} {shape} | {kind} | {backend} | {1e3 * median:.2f} | {ratio:.2f} |")
                rows.append(
                    {
                        **{"variant": backend, "size": label, "shape": shape, "dtype": kind},
                        **{"median_s": median, "ratio": ratio, "samples": samples[backend]},
                    }
                )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
