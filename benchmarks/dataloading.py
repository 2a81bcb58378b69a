"""How fast do JPEGs become batches, and what does an image cost in CPU time, here and in other loaders?

    python benchmarks/dataloading.py [--images 256] [--rounds 3] [--cores 1 2] [--qualities 75 90 95]

Each loader has a process of its own, held to so many cores with as many decoding threads or workers, and they take
turns. Photographs of 500 x 375 are written for it (`photographs.py`). A last table tells what each stage costs alone.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

# Run as a script, Python looks here first, where `kernels.py` would pass for a package of that name.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, report
from benchmarks.decoding import stage_rows
from benchmarks.loaders import BASELINE, LOADERS, UINT8, measure, processes, require_same_work
from benchmarks.markdown import table
from benchmarks.photographs import write_photographs

ROOT = Path(__file__).resolve().parents[1]
TARGET = 2.0
"""Times torchvision's images per CPU second that this engine's loader is meant to make."""


def compare(
    pools: dict[str, ProcessPoolExecutor], folder: Path, size: str, cores: list[int], args: argparse.Namespace
) -> list[dict]:
    """A row of each loader on the photographs of a folder, from these cores."""
    batches = max(1, args.images // args.batch)
    wall: dict[str, list[float]] = {name: [] for name in pools}
    cpu: dict[str, list[float]] = {name: [] for name in pools}
    for number in range(args.rounds + 1):
        for name, pool in pools.items():
            taken = pool.submit(measure, name, folder, args.batch, cores, batches).result()
            if number:  # the first reads the files into the page cache
                wall[name].append(taken[0])
                cpu[name].append(taken[1])
    images = batches * args.batch
    return [
        {
            **report.timed_row(
                name,
                f"{size}, {len(cores)} core{'s' * (len(cores) > 1)}",
                "float32" if name.startswith(("timm", BASELINE)) and "uint8" not in name else "uint8",
                wall[name],
                baseline=wall[BASELINE],
                images=images,
            ),
            "cores": len(cores),
            "cpu_s_per_image": median(cpu[name]) / images,
            "cpu_ratio": harness.ratio(cpu[BASELINE], cpu[name]),
            "cpu_samples": cpu[name],
        }
        for name in pools
    ]


def tables(stored: dict) -> dict[str, str]:
    """The page's tables of stored rows: `dataloading` and `dataloading_stages`."""
    header = [
        "loader",
        "photographs",
        "images/s",
        "p20–p80 ms a batch",
        "CPU ms an image",
        "× torchvision's images/s",
    ]
    header += ["× torchvision's images per CPU second", "× those of uint8"]
    alike = {row["size"]: row["cpu_samples"] for row in stored["rows"] if row["variant"] == UINT8}
    lines = []
    for row in stored["rows"]:
        batches = float(stored["arguments"]["images"]) // float(stored["arguments"]["batch"])
        lines.append(
            [
                *(row["variant"], row["size"], f"{row['images_per_s']:.0f}"),
                "–".join(f"{1e3 * row[key] / max(1, batches):.0f}" for key in ("p20_s", "p80_s")),
                f"{1e3 * row['cpu_s_per_image']:.2f}",
                *(f"{row[key]:.2f}" for key in ("ratio", "cpu_ratio")),
                f"{harness.ratio(alike[row['size']], row['cpu_samples']):.2f}"
                if row["size"] in alike
                else "–",
            ]
        )
    stages = [
        [row["variant"], row["size"], f"{1e3 * row['cpu_s_per_image']:.2f}"] for row in stored["stages"]
    ]
    return {
        "dataloading": table(header, lines),
        "dataloading_stages": table(["stage", "photographs", "CPU ms an image"], stages),
    }


def draw(path: Path, rows: list[dict]) -> None:
    """CPU milliseconds of an image, a group of bars for each set of photographs."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    bars = {
        name: [1e3 * row["cpu_s_per_image"] for row in rows if row["variant"] == name] for name in LOADERS
    }
    report.draw_bars(path, sizes, {name: bar for name, bar in bars.items() if bar}, "CPU ms an image")


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256, help="in a sample (default 256)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--qualities", type=int, nargs="+", default=[75, 90, 95])
    parser.add_argument("--photographs", type=int, default=512, help="how many different ones to write")
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS), metavar="LOADER")
    parser.add_argument(
        "--data", type=Path, default=Path("data/benchmark"), help="where to write photographs"
    )
    report.add_options(parser)
    args = parser.parse_args(arguments)
    available = sorted(os.sched_getaffinity(0))
    if max(args.cores) > len(available):
        parser.error(f"--cores {max(args.cores)}; expected at most the {len(available)} of this machine")
    os.chdir(ROOT)
    rows, stages, same = [], [], {}
    with processes(list(dict.fromkeys([BASELINE, *args.loaders]))) as pools:
        for quality in args.qualities:
            folder = write_photographs(args.data / f"q{quality}", args.photographs, quality)
            files = list(folder.glob("*/*.jpg"))
            size = f"q{quality} ({sum(file.stat().st_size for file in files) / len(files) / 1e3:.0f} kB)"
            same[size] = require_same_work(folder)
            for cores in args.cores:
                print(f"{size}, {cores} cores ...", file=sys.stderr, flush=True)
                rows += compare(pools, folder, size, available[:cores], args)
            stages += report.in_child(stage_rows, folder, size, args.rounds)
    stored = report.store("dataloading", rows, args, stages=stages, same_work=same)
    print("\n\n".join(tables(stored).values()))
    for row in rows:
        if row["variant"].startswith("fastmim"):
            print(
                f"{row['variant']}, {row['size']}: {row['cpu_ratio']:.2f} times torchvision a core; target {TARGET}"
            )
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    main()
