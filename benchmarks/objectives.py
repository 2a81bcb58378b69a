"""Every objective on the demo photographs, for equal steps: loss, images/s, peak memory, and a linear probe.

`python benchmarks/objectives.py` trains each through launch.py and prints a Markdown table; `--docs FOLDER` also
writes it, between the markers of FOLDER/objectives.md, with a picture of the loss curves.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.harness import describe_machine  # noqa: E402
from benchmarks.markdown import fill, table  # noqa: E402
from benchmarks.probe import labelled_cells, probe  # noqa: E402
from fastmim import recipes  # noqa: E402
from fastmim.data.demo import prepare_elpv  # noqa: E402
from fastmim.evaluate.encoder import load_encoder  # noqa: E402
from fastmim.evaluate.labels import LabelledImages  # noqa: E402
from fastmim.metrics import read_records  # noqa: E402
from fastmim.objectives import build_objective  # noqa: E402

DECODER = "objective.decoder_width=128 objective.decoder_depth=2 objective.decoder_heads=4"
TOKENS = "target.tokenizer={dvae}"
BATCH, IMAGES = 16, 2460

# Name -> overrides of the quickstart recipe (dvae: of dvae_small); {dvae} and {mae} are the runs of these names.
VARIANTS = {
    "mae": "objective.norm_pix_loss=true",
    "mae, PCA": "target.kind=pca target.components=24 objective.norm_pix_loss=true",
    "mae, mask token in encoder": "objective.mask_token_in_encoder=true objective.norm_pix_loss=true",
    "mae, cross decoder": "objective.decoder=cross objective.kept_mask_ratio=0.25 objective.norm_pix_loss=true",
    "mae, block 50 %": "mask.strategy=block mask.ratio=0.5 objective.norm_pix_loss=true",
    "simmim": "objective.name=simmim mask.ratio=0.6 mask.unit=2",
    "r_mae": f"objective.name=r_mae {DECODER}",
    "c_mae": f"objective.name=c_mae {DECODER}",
    "cae, pixels": "objective.name=cae mask.ratio=0.5 mask.strategy=block target.kind=pixels "
    "objective.regressor_depth=2 objective.decoder_depth=2",
    "dvae": "",
    "beit": f"objective.name=beit mask.ratio=0.4 mask.strategy=block {TOKENS}",
    "cae": f"objective.name=cae mask.ratio=0.5 mask.strategy=block {TOKENS} "
    "objective.regressor_depth=2 objective.decoder_depth=2",
    "cae_v2": "objective.name=cae_v2 mask.ratio=0.5 mask.strategy=block target.teacher={mae} "
    "objective.regressor_depth=1",
}
NEEDS = {"beit": "dvae", "cae": "dvae", "cae_v2": "mae"}


def train(name: str, overrides: str, folder: Path, steps: int) -> Path:
    """Train a variant to the end of a schedule of so many steps, in a process of its own; a finished run is kept."""
    run = folder / re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
    words = [
        *(f"output={run}", "data.source=data/elpv/train", "log.every_steps=10", "log.tensorboard=false"),
        *(
            "log.reconstruct_every_steps=null",
            f"optim.batch_size={BATCH}",
            f"optim.epochs={steps * BATCH / IMAGES}",
        ),
        # The recipes' learning rates at another batch.
        *(f"optim.blr={0.08 if name == 'dvae' else 0.016}", "optim.warmup_epochs=0.1", *overrides.split()),
    ]
    recipe = "dvae_small" if name == "dvae" else "quickstart"
    command = [sys.executable, "launch.py", "--config", recipe, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: launch.py ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return run


def measure(name: str, run: Path, cells: list[LabelledImages] | None) -> dict:
    """What a run says of itself, and what its encoder is worth."""
    records = read_records(run / "metrics.jsonl")
    row = {
        "variant": name,
        "steps": records[-1]["step"],
        "images_per_s": median(record["images_per_s"] for record in records[1:]),
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "losses": [[record["step"], record["loss"]] for record in records],
        "probe": None,
    }
    if cells is not None:
        row["probe"] = probe(*load_encoder(str(run)), cells)
    return row


def random_encoder(cells: list[LabelledImages]) -> float:
    """The probe of the same network before training."""
    torch.manual_seed(0)
    config = recipes.load("quickstart")
    return probe(build_objective(config).encoder.eval(), config, cells)


def summarise(rows: list[dict], random: float) -> str:
    """Markdown: a line per variant."""
    lines = []
    for row in rows:
        first, last = row["losses"][0][1], row["losses"][-1][1]
        accuracy = "–" if row["probe"] is None else f"{row['probe']:.1%}"
        speed, memory = f"{row['images_per_s']:.0f}", f"{row['peak_memory_bytes'] / 2**20:.0f}"
        lines.append([row["variant"], f"{first:.3f}", f"{last:.3f}", speed, memory, accuracy])
    lines.append(["random encoder", "–", "–", "–", "–", f"{random:.1%}"])
    header = [
        "objective",
        "loss, first 10 steps",
        "loss, last 10 steps",
        "images/s",
        "peak MiB",
        "linear probe",
    ]
    return table(header, lines)


def draw(path: Path, rows: list[dict]) -> None:
    """The loss curve of each variant, a panel each: their losses are of different kinds."""
    columns = 5
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(13, 2.2 * lines), layout="tight")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, row in zip(axes.flat, rows, strict=False):
        steps, losses = zip(*row["losses"], strict=True)
        axis.plot(steps, losses, linewidth=1.2)
        axis.set_title(row["variant"], fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of each (default 300)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, help="write machine and rows")
    parser.add_argument(
        "--docs", type=Path, help="write table and picture into FOLDER/objectives.md and .png"
    )
    args = parser.parse_args()
    os.chdir(ROOT)
    prepare_elpv(Path("data/elpv"))
    config = recipes.load("quickstart")
    cells = labelled_cells(config, [Path("data/elpv") / part for part in ("train", "heldout")])
    runs: dict[str, Path] = {}
    rows = []
    wanted = {*args.only, *(NEEDS[name] for name in args.only if name in NEEDS)}
    for name, overrides in VARIANTS.items():
        if name not in wanted:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        runs[name] = train(name, overrides.format(**runs), args.runs, args.steps)
        rows.append(measure(name, runs[name], None if name == "dvae" else cells))
    random = random_encoder(cells)
    text = summarise(rows, random)
    print(text)
    if args.json:
        machine = describe_machine("cpu")
        args.json.write_text(json.dumps({"machine": machine, "random_probe": random, "rows": rows}, indent=1))
    if args.docs:
        draw(args.docs / "objectives.png", rows)
        page = args.docs / "objectives.md"
        page.write_text(fill(page.read_text(), {"objectives": text}))


if __name__ == "__main__":
    main()
