"""Fine-tuning: an encoder and a head trained on labels, whole or the last blocks only, one part after the other."""

from typing import Any

import torch
from matplotlib.figure import Figure

from fastmim.errors import ConfigError
from fastmim.evaluate.finetune_training import Training
from fastmim.evaluate.job import Job
from fastmim.evaluate.scores import Outcome, accuracy

CURVE = "partial.png"


def evaluate_finetune(job: Job) -> Outcome:
    """Train on the training images, and classify the test images at the end.

    Several `trainable_blocks` are trained one after the other, told in `sweep` and drawn in partial.png; the outcome
    is that of the last. One that was finished before the evaluation was stopped is not trained again.

    Raises:
        ConfigError: batches that the images or the ranks do not fill.
        CheckpointError: the folder holds a part of another evaluation.
        TrainingAborted: an epoch without a finite gradient.
    """
    config = job.config
    _check_batches(job)
    rows: list[dict[str, Any]] = []
    blocks = config.trainable_blocks or [None]
    for number in blocks:
        name = "finetune" if len(blocks) == 1 else f"blocks-{number:g}"
        training = Training(job, number, name)
        try:
            training.run()
        finally:
            training.close()
        outcome = Outcome(training.predict(), torch.from_numpy(job.test.labels))
        row = {"trainable_blocks": number, **training.told(), "test_top1": accuracy(outcome)}
        rows.append(row | ({"load": job.ranks.run_on_first(training.save_model)} if config.save else {}))
    if len(rows) > 1:
        job.ranks.run_on_first(lambda: draw_curve(job, rows))
    return Outcome(outcome.best, outcome.labels, {"sweep": rows})


def _check_batches(job: Job) -> None:
    config, world = job.config, job.ranks.world_size
    if config.batch_size > len(job.train):
        raise ConfigError(
            f"batch_size={config.batch_size}; expected at most the {len(job.train)} training images"
        )
    parts = world * config.accumulation
    # Images are mixed in pairs, which no backward pass may part.
    unit = 2 * parts if config.mixes else parts
    if config.batch_size % unit:
        pairs = ", in pairs, since mixup or cutmix is above 0" if config.mixes else ""
        raise ConfigError(
            f"batch_size={config.batch_size}; expected a multiple of {unit} ({world} ranks x "
            f"accumulation={config.accumulation}{pairs})"
        )


def draw_curve(job: Job, rows: list[dict[str, Any]]) -> None:
    """Draw accuracy against the number of trained blocks (MAE, figure 9)."""
    rows = sorted(rows, key=lambda row: row["trainable_blocks"])
    figure = Figure(figsize=(4.8, 3.4), layout="tight")
    axis = figure.subplots()
    places = range(len(rows))
    axis.plot(places, [100 * row["test_top1"] for row in rows], marker="o")
    # Evenly spaced, as in the paper: the first blocks change most.
    axis.set_xticks(places, [f"{row['trainable_blocks']:g}" for row in rows])
    for place, row in zip(places, rows, strict=True):
        label = f"{row['test_top1']:.1%}"
        axis.annotate(label, (place, 100 * row["test_top1"]), (0, 6), textcoords="offset points", ha="center")
    axis.margins(x=0.1, y=0.2)
    axis.set(xlabel=f"fine-tuned blocks of {job.trained.model.depth}", ylabel="test top-1, %")
    axis.grid(alpha=0.3)
    figure.savefig(job.folder / CURVE, dpi=110)
