"""The protocol `detect`: read images with boxes, train a detector, find what is in others, and tell how well."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmim.config_data import DataConfig
from fastmim.errors import DataError
from fastmim.evaluate.batches import centre_plan, decode
from fastmim.evaluate.dense import DenseEncoder
from fastmim.evaluate.detect.annotations import BoxedImages, check_same_categories, read_boxed
from fastmim.evaluate.detect.coco import Detections, check_installed, measure
from fastmim.evaluate.detect.config import DetectConfig
from fastmim.evaluate.detect.confusion import NOTHING, box_confusion
from fastmim.evaluate.detect.model import build_detector, detect
from fastmim.evaluate.detect.pictures import SHOWN_SCORE, Sample, draw_samples
from fastmim.evaluate.detect.training import train_detector
from fastmim.evaluate.job import Job, Task
from fastmim.evaluate.scores import draw_confusion
from fastmim.evaluate.split import check_test_told

CONFUSION, PREDICTIONS = "confusion.png", "predictions.png"
_MOST_DRAWN = 400


@dataclass(frozen=True, eq=False)
class Found:
    """What a detector found in the test images, by row of their index, and its losses in the last epoch."""

    detections: dict[int, Detections]
    losses: dict[str, float | None]


class Detection(Task):
    """Images with boxes; an outcome is `Found`."""

    def read(
        self, data: str, test: str | None, images: DataConfig, config: DetectConfig
    ) -> tuple[BoxedImages, BoxedImages]:
        """The training images that have an object, and the test images, held out where there is no `test`."""
        check_installed()
        check_test_told(test, "test_annotations", config)
        given = config.test_annotations
        options = config.masks, config.drop_empty_boxes
        train = read_boxed(data, config.annotations, images, "--data", *options)
        if test is None or given is None:
            train, tested = train.hold_out(config.test_share, config.seed)
            return train.with_objects(), tested
        tested = read_boxed(test, given, images, "--test", *options)
        check_same_categories(train, tested)
        # One folder may hold both: the annotations say what is whose.
        shared = np.intersect1d(train.rows, tested.rows)
        if len(shared) and tested.index.root == train.index.root:
            raise DataError(
                f"{train.index.name(int(shared[0]))} and {len(shared) - 1} more are in annotations and in "
                "test_annotations; expected other images to test on"
            )
        return train.with_objects(), tested

    def write(self, job: Job, outcome: Found, title: str) -> dict[str, Any]:
        """COCO's figures, confusion.png, and predictions.png where some are asked for."""
        told = measure(job.test, outcome.detections) | {"train_losses": outcome.losses}
        line = f"{title} {job.config.head}: {self.headline(told | {'test': job.test.described()})}"
        matrix = box_confusion(job.test, outcome.detections, SHOWN_SCORE)
        names = (*job.test.categories.values(), NOTHING)
        about = f"{line}; boxes with scores from {SHOWN_SCORE:g}".replace("; ", "\n")
        draw_confusion(job.folder / CONFUSION, matrix, names, about)
        if job.config.pictures:
            shown = job.test.rows[: job.config.pictures].tolist()
            samples = [_sample(job, row, outcome.detections[row]) for row in shown]
            draw_samples(job.folder / PREDICTIONS, samples, job.test.categories, line)
        return told

    def headline(self, told: dict[str, Any]) -> str:
        """Average precision of boxes, and of masks where there are."""
        parts = [
            f"{key} AP {_shown(told[key]['AP'])}, AP50 {_shown(told[key]['AP50'])}"
            for key in ("box", "mask")
            if key in told
        ]
        test = told["test"]
        parts.append(
            f"{test['classes']} classes, {test['objects']:,} objects in {test['images']:,} test images"
        )
        return "; ".join(parts)


def evaluate_detect(job: Job) -> Found:
    """Train a detector, and the encoder where that is asked for, on the training images; look at the test images.

    Raises:
        ConfigError: a training that makes no sense, such as one without steps.
        TrainingAborted: an epoch without a finite gradient.
    """
    config, ranks = job.config, job.ranks
    encoder = DenseEncoder(
        job.encoder,
        job.trained,
        blocks=[job.trained.model.depth],
        trainable=config.trainable,
        drop_path=config.drop_path if config.trainable else None,
        window=config.window,
    )
    model = build_detector(encoder, config, job.trained.data.mean, len(job.train.categories)).to(ranks.device)
    losses = train_detector(model, job)
    own = job.test.take(slice(ranks.rank, None, ranks.world_size))
    size = max(1, config.batch_size // (ranks.world_size * config.accumulation))
    found = detect(model, own, job.trained.data, config, size, ranks.device) if len(own) else ()
    mine = dict(zip(own.rows.tolist(), found, strict=True))
    return Found({row: each for part in ranks.gather(mine) for row, each in part.items()}, losses)


def _sample(job: Job, row: int, found: Detections) -> Sample:
    """An image with its boxes, no larger than can be seen."""
    images = job.test
    size = np.array([images.index.heights[row], images.index.widths[row]], np.int64)
    factor = min(1, _MOST_DRAWN / size.max())
    shown = np.maximum(1, np.rint(size * factor)).astype(int)
    data = job.trained.data.model_copy(update={"image_size": tuple(shown.tolist())})
    plan = centre_plan(images.index, np.array([row]), data, side=1.0)
    (image,) = next(decode(images.index, data, plan, 1, torch.device("cpu")))
    boxes = np.array([each["bbox"] for each in images.objects[row]], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    kinds = np.array([each["category_id"] for each in images.objects[row]], np.int64)
    return Sample(
        image.numpy().copy(), boxes * factor, kinds, found.boxes * factor, found.categories, found.scores
    )


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"
