"""What pre-training is worth: accuracies of classifiers on its features, beside random weights and raw pixels.

`python benchmarks/representation.py fashion_mnist` (or `photographs`) pre-trains through launch.py and tries each
classifier on 1, 10 and 100 % of the labels; `--equal-time` also trains transformers' ViTMAE by a plain loop for the
same time and probes both. Finished parts are kept: a second call makes what is missing. `--docs FOLDER` writes the
tables between the markers of FOLDER/evaluation.md, and their rows into FOLDER/results.
"""

import argparse
import logging
import os
import sys
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.kept import OURS, RANDOM, Results, cost, parse, percent, tell  # noqa: E402
from benchmarks.labelled_sets import (  # noqa: E402
    SETS,
    LabelledSet,
    StoredFeatures,
    features,
    pixels,
    share_of,
)
from benchmarks.markdown import table  # noqa: E402
from benchmarks.pretraining import initial_weights, pretrain, pretrain_plain  # noqa: E402
from fastmim import recipes  # noqa: E402
from fastmim.evaluate.encoder import fingerprint_of, load_encoder  # noqa: E402
from fastmim.evaluate.job import Job  # noqa: E402
from fastmim.evaluate.knn import ask_neighbours  # noqa: E402
from fastmim.evaluate.linear import evaluate_exact  # noqa: E402
from fastmim.evaluate.protocols import PROTOCOLS, load  # noqa: E402
from fastmim.evaluate.scores import summary  # noqa: E402
from fastmim.ranks import Ranks  # noqa: E402

PIXELS, PLAIN = "raw pixels", "transformers"
STORED = {"linear": ("linear_small", evaluate_exact), "knn": ("knn_small", ask_neighbours)}
"""Classifiers of features that are computed once: recipe, and what runs it."""
MAX_ITERATIONS = 50
"""Of the linear classifiers, alike for every column: the optimum of all labels takes minutes more."""
TRAINED = {"partial": ["trainable_blocks=1"], "full": []}
"""Classifiers that train on from the weights: overrides of fine-tuning."""
SHORT = [
    *("layer_decay=0.75", "warmup_epochs=0.5", "scale=[0.6,1]", "center=1", "workers=0"),
    *("rand_augment=null", "mixup=0", "cutmix=0", "erasing=0", "drop_path=0"),
]
"""Fine-tuning in a few hundred small steps, which the paper's regularisation would not let learn."""
PEAK_LR = 2.5e-3
"""Of fine-tuning, whatever the batch: scaled down with one of 8, it ends before the larger class is left."""

QUICK = [
    *("model.width=32", "model.depth=2", "model.heads=2", "objective.decoder_width=16"),
    *("objective.decoder_depth=1", "objective.decoder_heads=2", "optim.batch_size=16", "train.max_steps=4"),
    *("log.every_steps=1", "log.reconstruct_every_steps=null", "data.threads=1"),
]
"""A network and a run of seconds, whose accuracies say nothing."""
_QUICK_IMAGES = 2000  # of which 1 % are two of each of ten classes: one to train on and one that chooses


class Weights:
    """The networks and features that rows are made of; each is computed when a row asks for it.

    Args:
        labelled: the set.
        paths: weights by their name in the tables.
        quick: few images.
    """

    def __init__(self, labelled: LabelledSet, paths: dict[str, Path], quick: bool):
        self.paths, self._pool = paths, labelled.pool
        self.config = recipes.load(str(paths[OURS] / "config.yaml"))
        self.train, self.test = labelled.read(self.config)
        if quick:
            self.train, self.test = (
                share_of(images, min(0.5, _QUICK_IMAGES / len(images)), 0)
                for images in (self.train, self.test)
            )
        self.features = cache(self._features)

    def _features(self, name: str) -> StoredFeatures:
        compute = (
            pixels(self.config)
            if name == PIXELS
            else features(*load_encoder(str(self.paths[name])), self._pool)
        )
        return StoredFeatures((self.train, self.test), compute)


def from_stored(weights: Weights, protocol: str, name: str, share: float, draws: int) -> dict:
    """Mean accuracies over draws of a share of the labels, by a classifier of stored features."""
    recipe, classify = STORED[protocol]
    words = [f"max_iterations={MAX_ITERATIONS}"] if protocol == "linear" else []
    config = recipes.load_evaluation(PROTOCOLS[protocol].config, protocol, recipe, words)
    each = []
    for draw in range(1 if share == 1 else draws):
        train, settings = share_of(weights.train, share, draw), config
        if protocol == "knn":
            settings = config.model_copy(update={"k": min(config.k, int(np.bincount(train.labels).min()))})
        outcome = classify(weights.features(name), train, weights.test, settings)
        each.append(summary(outcome, train.class_names)["mean_class_top1"])
    return {"accuracy": each}


def batch_and_rate(images: int) -> list[str]:
    """Overrides of fine-tuning: at most 64 images a step, a power of 2 with three steps an epoch or more; `PEAK_LR`."""
    batch = min(64, 1 << (images // 3).bit_length() - 1)
    return [f"batch_size={batch}", f"blr={PEAK_LR * 256 / batch}"]


def from_training(
    weights: Weights, overrides: list[str], name: str, share: float, epochs: int, folder: Path
) -> dict:
    """The accuracy of a network that is trained on from its weights, on the first draw of a share of the labels."""
    entry, train = PROTOCOLS["finetune"], share_of(weights.train, share, 0)
    words = [*SHORT, *overrides, *batch_and_rate(len(train)), f"epochs={epochs}", f"test_every={epochs}"]
    encoder, trained = load_encoder(str(weights.paths[name]))
    config = recipes.load_evaluation(entry.config, "finetune", None, words).resolved(trained)
    identity = {"protocol": "finetune", "settings": config.model_dump(mode="json")}
    identity |= {part: images.described() for part, images in (("train", train), ("test", weights.test))}
    identity["weights"] = {"sha256": fingerprint_of(encoder)}
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(encoder, trained, config, train, weights.test, folder, Ranks(), identity)
    outcome = load(entry.runner)(job)
    return {"accuracy": [summary(outcome, train.class_names)["mean_class_top1"]]}


def key_of(protocol: str, name: str, share: float) -> str:
    """The name of a row."""
    return f"{protocol}, {name}, {share:g}"


def pretrained(results: Results, labelled: LabelledSet, folder: Path, minutes: float, quick: bool) -> Weights:
    """Pre-train, and say where the weights are."""
    overrides = QUICK if quick else []
    run = folder / "run"
    results.keep("pre-training", lambda: pretrain(labelled.recipe, labelled.train, run, minutes, overrides))
    initial = folder / "initial.safetensors"
    if not initial.exists():
        initial_weights(run, initial)
    return Weights(
        labelled, {OURS: run, RANDOM: initial, PLAIN: folder / "plain" / "weights.safetensors"}, quick
    )


def measure(results: Results, weights: Weights, labelled: LabelledSet, folder: Path, quick: bool) -> None:
    """Make every row of the table of accuracies."""
    for name in (OURS, RANDOM, PIXELS):
        for protocol in STORED:
            for share in labelled.shares:
                make = partial(from_stored, weights, protocol, name, share, labelled.draws)
                results.keep(key_of(protocol, name, share), make)
        weights.features.cache_clear()
    for name in (OURS, RANDOM):
        for protocol, words in TRAINED.items():
            for share, epochs in labelled.epochs.items():
                key = key_of(protocol, name, share)
                out = folder / "finetune" / key.replace(", ", "-").replace(" ", "-")
                epochs = 1 if quick else epochs
                results.keep(key, partial(from_training, weights, words, name, share, epochs, out))


def race(results: Results, weights: Weights, labelled: LabelledSet, workers: int) -> None:
    """Train transformers' ViTMAE for as long as this engine took, and probe both."""
    folder, seconds = weights.paths[PLAIN].parent, results.told["rows"]["pre-training"]["run_seconds"]
    initial = weights.paths[RANDOM]
    results.keep(PLAIN, lambda: pretrain_plain(weights.paths[OURS], initial, folder, seconds, workers))
    for name in (OURS, PLAIN):
        for share in labelled.shares:
            make = partial(from_stored, weights, "linear", name, share, labelled.draws)
            results.keep(key_of("linear", name, share), make)
        weights.features.cache_clear()


def accuracy(rows: dict, key: str) -> str:
    """A row's mean accuracy, with its standard deviation over draws; a dash where there is none."""
    return percent(rows[key]["accuracy"] if key in rows else [])


def accuracy_table(told: dict, labelled: LabelledSet) -> str:
    """Markdown: a line for each classifier and share of the labels, and what it cost."""
    rows = told["rows"]
    lines = []
    for protocol in (*STORED, *TRAINED):
        for share in labelled.shares:
            cells = [accuracy(rows, key_of(protocol, name, share)) for name in (OURS, RANDOM, PIXELS)]
            if set(cells) != {"–"}:
                lines.append([protocol, f"{share:.0%}", *cells])
    header = ["classifier", "labels", OURS, RANDOM, PIXELS]
    own = {key: row for key, row in rows.items() if PLAIN not in key}  # the race has a table of its own
    return f"{table(header, lines)}\n\n{labelled.title}: {cost({**told, 'rows': own})}."


def race_table(told: dict, labelled: LabelledSet) -> str:
    """Markdown: images seen and the linear probe, by who trained."""
    rows = told["rows"]
    header = [
        "trained by",
        "minutes",
        "images seen",
        *(f"linear, {share:.0%} of labels" for share in labelled.shares),
    ]
    lines = []
    for title, name, row in (
        ("fastmim, launch.py", OURS, "pre-training"),
        ("transformers, plain loop", PLAIN, PLAIN),
    ):
        cells = [accuracy(rows, key_of("linear", name, share)) for share in labelled.shares]
        lines.append([title, f"{rows[row]['run_seconds'] / 60:.1f}", f"{rows[row]['images']:,}", *cells])
    return table(header, lines)


def main(arguments: list[str] | None = None) -> None:
    """Pre-train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument(
        "--equal-time", action="store_true", help="beside transformers' ViTMAE, by the linear probe"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="of the DataLoader of --equal-time"
    )
    args = parse(parser, arguments, None, "runs/representation")
    os.chdir(ROOT)
    logging.getLogger("fastmim").setLevel(logging.ERROR)  # that MAX_ITERATIONS ended a fit is as meant
    labelled = SETS[args.set]
    labelled.prepare()
    minutes = args.minutes or labelled.minutes
    folder = args.runs / args.set
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.json", {"set": args.set, "minutes": minutes, "quick": args.quick})
    weights = pretrained(results, labelled, folder, minutes, args.quick)
    if args.equal_time:
        race(results, weights, labelled, args.workers)
        name, text = f"{args.set}_equal_time", race_table(results.told, labelled)
    else:
        measure(results, weights, labelled, folder, args.quick)
        name, text = args.set, accuracy_table(results.told, labelled)
    tell(args, results.told, args.set, name, text)


if __name__ == "__main__":
    main()
