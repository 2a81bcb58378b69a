"""What every timing script shares besides the clock: the keys of a row, the same-answer check, and where results go."""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import harness, markdown
from fastmim.flops import measure_peak_flops
from fastmim.provenance import source_commit
from fastmim.window import peak_memory_bytes

RESULTS = Path(__file__).parent / "results"
"""Where the rows that `README.md` shows are kept."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every script has."""
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where to store the rows (default: in benchmarks/results/)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows")


def timed_row(
    variant: str,
    size: str,
    dtype: str,
    samples: list[float],
    *,
    baseline: list[float],
    images: int,
    flops: float | None = None,
    baseline_flops: float | None = None,
    peak_memory: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A row of one contender.

    Args:
        variant: the contender.
        size: of the model.
        dtype: that its products are computed in.
        samples: seconds, one a round.
        baseline: those of the contender that it is compared with, in the same rounds.
        images: in a sample.
        flops: of a sample, forward and backward, analytic; None where that has no meaning, as for a loader.
        baseline_flops: likewise of the baseline; needed where there are `flops`.
        peak_memory: bytes; None where a process of its own did not measure it.
        more: further keys.

    Returns:
        `ratio` is how many times faster than the baseline (median over rounds), `ratio_range` the least and most of
        a round, `flop_ratio` how many times fewer operations, and `efficiency` the one over the other. `mfu` is left to
        `PeakRate.fill`.
    """
    times = harness.summarise(samples)
    seconds = {key.replace("_us", "_s"): value / 1e6 for key, value in times.items()}
    ratio, rounds = harness.ratio(baseline, samples), harness.ratios(baseline, samples)
    flop_ratio = efficiency = None
    if flops is not None:
        flop_ratio = baseline_flops / flops
        efficiency = ratio / flop_ratio
    return {
        "variant": variant,
        "size": size,
        "dtype": dtype,
        **seconds,
        "images_per_s": images / seconds["median_s"],
        "flops": flops,
        "mfu": None,
        "peak_memory_bytes": peak_memory,
        "ratio": ratio,
        "ratio_range": [min(rounds), max(rounds)],
        "flop_ratio": flop_ratio,
        "efficiency": efficiency,
        "samples": samples,
        **more,
    }


class PeakRate:
    """FLOP/s of a large product, measured between the turns of a run: an hour's machine is not always as fast.

    Args:
        device: that the run computes on.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.samples: dict[str, list[float]] = {}

    def measure(self, dtype: str) -> None:
        """Once more, with factors of a dtype, bf16 or fp32; the device should have nothing else to do."""
        found = measure_peak_flops(self._device, harness.DTYPES[dtype])
        self.samples.setdefault(dtype, []).append(found)

    def best(self, dtype: str) -> float:
        """The fastest so far."""
        return max(self.samples[dtype])

    def fill(self, rows: list[dict]) -> list[dict]:
        """Give rows that tell their FLOPs an `mfu`: their share of the fastest."""
        for row in rows:
            if row["flops"] is not None:
                row["mfu"] = row["flops"] / row["median_s"] / self.best(row["dtype"])
        return rows


def require_same(losses: dict[str, float], tolerance: float) -> None:
    """Refuse to compare what does not compute the same thing.

    Args:
        losses: contender -> loss, of the same weights, images and masks.
        tolerance: largest difference from the first, relative to it.
    """
    (first, wanted), *others = losses.items()
    for name, loss in others:
        if not abs(loss - wanted) <= tolerance * abs(wanted):
            sys.exit(
                f"{name} has the loss {loss:.7g}, {first} {wanted:.7g}; expected equal ones within {tolerance:g}: "
                "no speed-up is told of different computations"
            )


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """What a module's function returns in a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


class PeakMemory:
    """Bytes above what is held at the start: imports do not count, what is built and computed does.

    Only the first of a process tells something: use it in a child.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._before = self._held()

    def bytes(self) -> int:
        """The peak since the start."""
        return peak_memory_bytes(self.device) - self._before

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def store(script: str, rows: list[dict], args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Write rows, the machine, versions, the commit and the arguments to --json, or else to results/`script`.json.

    Returns:
        What was written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    told = {
        "machine": {**harness.describe_machine(device), "commit": source_commit()},
        # Paths by their last part: rows are read elsewhere.
        "arguments": {
            name: str(value.name if isinstance(value, Path) else value)
            for name, value in vars(args).items()
            if value is not None
        },
        **more,
        "rows": rows,
    }
    text = json.dumps(told, indent=1) + "\n"
    path = args.json or RESULTS / f"{script}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return json.loads(text)  # as a reader of the file has it


def draw_bars(path: Path, groups: list[str], bars: dict[str, list[float]], label: str) -> None:
    """Draw grouped bars.

    Args:
        path: of the picture.
        groups: names below the groups.
        bars: name -> height in each group.
        label: of the axis.
    """
    figure = Figure(figsize=(max(6, 1.2 * len(groups) * (1 + len(bars) / 6)), 4), layout="tight")
    axis = figure.subplots()
    width = 0.85 / len(bars)
    for place, (name, heights) in enumerate(bars.items()):
        axis.bar([group + place * width for group in range(len(groups))], heights, width, label=name)
    axis.set_xticks([group + width * (len(bars) - 1) / 2 for group in range(len(groups))], groups, fontsize=8)
    axis.set_ylabel(label)
    axis.margins(y=0.25)  # for the legend
    axis.legend(fontsize=8, ncols=3, loc="upper left")
    figure.savefig(path, dpi=90)


def timed_table(rows: list[dict], extra: tuple[str, ...] = ()) -> str:
    """A Markdown table of timed rows, with further keys at its end."""
    header = ["variant", "size", "dtype", "median ms", "p20–p80", "images/s", "GFLOP", "MFU", "peak MiB"]
    header += ["speed-up", "of a round", "FLOP ratio", "speed-up ÷ FLOP ratio", *extra]
    lines = []
    for row in rows:
        memory = row["peak_memory_bytes"]
        lines.append(
            [
                *(row[key] for key in ("variant", "size", "dtype")),
                f"{1e3 * row['median_s']:.0f}",
                f"{1e3 * row['p20_s']:.0f}–{1e3 * row['p80_s']:.0f}",
                f"{row['images_per_s']:.1f}",
                f"{row['flops'] / 1e9:.0f}",
                f"{row['mfu']:.0%}",
                "–" if memory is None else f"{memory / 2**20:.0f}",
                f"{row['ratio']:.2f}",
                "–".join(f"{limit:.2f}" for limit in row["ratio_range"]),
                *(f"{row[key]:.2f}" for key in ("flop_ratio", "efficiency")),
                *(row[key] for key in extra),
            ]
        )
    return markdown.table(header, lines)
