"""What pre-training is worth to segmentation and detection: shapes drawn on photographs, of which few have labels.

`python benchmarks/dense.py` draws the sets, pre-trains through launch.py on the images without labels, and trains each
task from those weights and from the random ones that pre-training began with. Finished parts are kept: a second call
makes what is missing. `--docs FOLDER` writes the table between the markers of FOLDER/evaluation.md, and its rows into
FOLDER/results.
"""

import argparse
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.kept import OURS, RANDOM, Results, cost, parse, percent, tell  # noqa: E402
from benchmarks.markdown import table  # noqa: E402
from benchmarks.pretraining import initial_weights, pretrain, run_process  # noqa: E402
from benchmarks.shapes import draw_shapes  # noqa: E402

SIZE = 64
SETS = {"unlabelled": 6000, "train": 100, "test": 150}
"""Images of each set; each is drawn by another seed."""
RECIPE = "quickstart"
OVERRIDES = [
    *(f"data.image_size={SIZE}", "optim.batch_size=32", "optim.blr=1.2e-2", "optim.warmup_epochs=0.5"),
    "log.reconstruct_every_steps=null",
]
MASKS = ["masks={train}/masks", "test_masks={test}/masks", "save_minutes=1000"]
BOXES = ["annotations={train}/instances.json", "test_annotations={test}/instances.json"]
TASKS = {
    "segmentation, frozen encoder and one layer": (
        "segment",
        [*MASKS, "head=linear", f"crop={SIZE}", "scale=[1,1.5]", "epochs=60", "warmup_steps=20", "lr=3e-3"],
        lambda told: told["miou"],
    ),
    "segmentation, UPerNet": (
        "segment",
        ["--recipe", "segment_small", *MASKS, f"crop={SIZE}"],
        lambda told: told["miou"],
    ),
    "detection, Faster R-CNN": (
        "detect",
        ["--recipe", "detect_small", *BOXES, f"image_size={SIZE}"],
        lambda told: told["box"]["AP"],
    ),
}
"""Title -> protocol, its words, and the figure of its eval.json: mean IoU, or COCO's AP."""
SEEDS = 3
MINUTES = 18
QUICK_SETS = {"unlabelled": 24, "train": 8, "test": 4}
QUICK = {
    "pre-training": [
        *("model.width=32", "model.depth=2", "model.heads=2", "objective.decoder_width=16"),
        *(
            "objective.decoder_depth=1",
            "objective.decoder_heads=2",
            "optim.batch_size=8",
            "train.max_steps=2",
        ),
        *("log.every_steps=1", "data.threads=1"),
    ],
    "segment": ["epochs=1", "batch_size=4", "warmup_steps=0"],
    "detect": ["epochs=1", "batch_size=4", "warmup_steps=0"],
}
"""A network and runs of seconds, whose figures say nothing."""


def draw_sets(folder: Path, counts: dict[str, int]) -> dict[str, Path]:
    """Draw what is not there yet; returns the sets' folders by name."""
    places = {name: folder / f"{name}-{count}" for name, count in counts.items()}
    for seed, (name, place) in enumerate(places.items()):
        if not (place / "instances.json").exists():  # written last
            shutil.rmtree(place, ignore_errors=True)
            draw_shapes(place, counts[name], SIZE, seed)
    return places


def evaluate(title: str, weights: Path, seed: int, places: dict[str, Path], out: Path, quick: bool) -> dict:
    """Train and test one task by `fastmim evaluate`; returns its figure."""
    protocol, words, figure = TASKS[title]
    words = [word.format(**places) for word in words]
    images = ["--data", str(places["train"] / "images"), "--test", str(places["test"] / "images")]
    command = [sys.executable, "-m", "fastmim.cli", "evaluate", protocol, "--weights", str(weights), *images]
    more = QUICK[protocol] if quick else []
    run_process([*command, "--out", str(out), "--force", *words, f"seed={seed}", "pictures=4", *more])
    return {"figure": figure(json.loads((out / "eval.json").read_text()))}


def key_of(title: str, start: str, seed: int) -> str:
    """The name of a row."""
    return f"{title}, {start}, seed {seed}"


def figures_table(told: dict) -> str:
    """Markdown: a line for each task, and what it cost."""
    rows, lines = told["rows"], []
    for title in TASKS:
        cells = []
        for start in (OURS, RANDOM):
            keys = [key_of(title, start, seed) for seed in range(SEEDS)]
            cells.append(percent([rows[key]["figure"] for key in keys if key in rows]))
        lines.append([title, "AP" if TASKS[title][0] == "detect" else "mIoU", *cells])
    header = ["task", "%", OURS, RANDOM]
    return f"{table(header, lines)}\n\nMean and standard deviation over {SEEDS} seeds: {cost(told)}."


def main(arguments: list[str] | None = None) -> None:
    """Draw, pre-train, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    args = parse(parser, arguments, MINUTES, "runs/dense")
    os.chdir(ROOT)
    args.runs.mkdir(parents=True, exist_ok=True)
    places = draw_sets(args.runs, QUICK_SETS if args.quick else SETS)
    results = Results(args.runs / "results.json", {"minutes": args.minutes, "quick": args.quick})
    run, initial = args.runs / "run", args.runs / "initial.safetensors"
    words = [*OVERRIDES, *(QUICK["pre-training"] if args.quick else [])]
    source = str(places["unlabelled"] / "images")
    results.keep("pre-training", lambda: pretrain(RECIPE, source, run, args.minutes, words))
    if not initial.exists():
        initial_weights(run, initial)
    for title in args.tasks:
        for seed in range(SEEDS):
            for start, weights in {OURS: run, RANDOM: initial}.items():
                key = key_of(title, start, seed)
                out = args.runs / "tasks" / key.replace(", ", "-").replace(" ", "-")
                results.keep(key, partial(evaluate, title, weights, seed, places, out, args.quick))
    tell(args, results.told, "dense", "dense", figures_table(results.told))


if __name__ == "__main__":
    main()
