"""Write the tables of `kernels/README.md`, which stand between markers, from stored rows.

python benchmarks/kernels.py --static --dtypes bfloat16 --archs sm_90 --json rows.json
python benchmarks/readme.py rows.json
"""

import argparse
import json
import sys
from pathlib import Path

# Run as a script, Python looks here first, where `kernels.py` would pass for a package of that name.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.logits import Logits
from benchmarks.markdown import fill, table
from benchmarks.problems import SHAPES
from benchmarks.rows import BANDWIDTH

README = Path(__file__).resolve().parents[1] / "kernels" / "README.md"
HEADER = [
    *("shape", "pass", "launches", "registers", "spills", "shared B", "occupancy", "load / store bits"),
    *("MB", "× floor", "eager × floor", "eager launches", "µs on " + " / ".join(BANDWIDTH)),
]


def kernel_table(rows: list[dict], kernel: str) -> str:
    """The rows of one kernel, all of one dtype and architecture."""
    lines = []
    for row in rows:
        if row["kernel"] != kernel:
            continue
        floor, occupancy = row["floor_bytes"], row["occupancy"]
        lines.append(
            [
                *(row["shape"], row["pass"], row["launches"], row["registers"], row["spills"]),
                *(row["shared_bytes"], "–" if occupancy is None else f"{occupancy:.2f}"),
                f"{row['load_bits']} / {row['store_bits']}",
                *(f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / floor:.3f}"),
                *(f"{row['eager_bytes'] / floor:.1f}", row["eager_launches"]),
                " / ".join(f"{row['predicted_us'][gpu]:.1f}" for gpu in BANDWIDTH),
            ]
        )
    return table(HEADER, lines)


def problems() -> dict[str, Logits]:
    """The losses over logits at batch 64 in bfloat16: CAE's tokens, and contrast within the batch."""
    found = {}
    for shape in SHAPES.values():
        removed = shape.batch * shape.removed
        found[f"masked_cross_entropy {shape.name}"] = Logits(removed, shape.width, shape.classes)
        found[f"info_nce {shape.name}"] = Logits(removed, shape.decoder_width, removed)
    return found


def logits_table() -> str:
    """Bytes and times of the losses over logits, by arithmetic."""
    header = ["loss", "R × D × V", "chunks", "floor MB", "tiled, × floor", "chunked, × floor"]
    header += [
        "logits MB",
        "weights MB",
        *(f"µs on {gpu}: products / memory / logits cached" for gpu in BANDWIDTH),
    ]
    lines = []
    for name, problem in problems().items():
        seconds = [
            (problem.product_seconds(gpu), *(problem.memory_seconds(gpu, cached) for cached in (False, True)))
            for gpu in BANDWIDTH
        ]
        lines.append(
            [
                *(name, f"{problem.rows} × {problem.columns} × {problem.classes}", problem.chunks),
                *(f"{problem.floor / 1e6:.0f}", f"{problem.tiled_bound / problem.floor:.1f}"),
                *(f"{problem.chunked_bytes / problem.floor:.1f}", f"{problem.logits_bytes / 1e6:.0f}"),
                f"{problem.weight_bytes / 1e6:.0f}",
                *(" / ".join(f"{1e6 * value:.0f}" for value in times) for times in seconds),
            ]
        )
    return table(header, lines)


def tables(rows: list[dict]) -> dict[str, str]:
    """The table of each kernel that has rows, and that of the losses over logits.

    Raises:
        ValueError: rows of more than one dtype (int64 aside) or architecture.
    """
    for key in ("dtype", "arch"):
        if len(kinds := {row[key] for row in rows} - {"int64"}) != 1:
            raise ValueError(f"rows have {key} {', '.join(sorted(kinds))}; wanted one")
    kernels = dict.fromkeys(row["kernel"] for row in rows)
    return {"logits": logits_table()} | {kernel: kernel_table(rows, kernel) for kernel in kernels}


def main(arguments: list[str] | None = None) -> None:
    """Fill the README's tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="what `kernels.py --static --json` stored")
    args = parser.parse_args(arguments)
    README.write_text(fill(README.read_text(), tables(json.loads(args.rows.read_text())["rows"])))


if __name__ == "__main__":
    main()
