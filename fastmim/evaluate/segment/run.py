"""The protocol `segment`: read images with masks, train a head, predict, and tell how right it was."""

import math
from typing import Any

import numpy as np
import torch

from fastmim.config_data import DataConfig
from fastmim.errors import ConfigError
from fastmim.evaluate.batches import centre_plan, decode
from fastmim.evaluate.dense import DenseEncoder
from fastmim.evaluate.job import Job, Task
from fastmim.evaluate.scores import draw_confusion
from fastmim.evaluate.segment.config import SegmentConfig
from fastmim.evaluate.segment.masks import MaskedImages, MaskReader, read_masked, read_names
from fastmim.evaluate.segment.model import Segmenter, build_head, predict
from fastmim.evaluate.segment.scores import Sample, Segmentation, count_pixels, draw_samples, summary
from fastmim.evaluate.segment.training import train_segmenter
from fastmim.evaluate.split import check_test_told

CONFUSION, PREDICTIONS = "confusion.png", "predictions.png"
_MOST_DRAWN = 400


class SemanticSegmentation(Task):
    """Images with masks; an outcome is `scores.Segmentation`."""

    def read(
        self, data: str, test: str | None, images: DataConfig, config: SegmentConfig
    ) -> tuple[MaskedImages, MaskedImages]:
        """The training and the test images; a share is held out where there is no `test`."""
        check_test_told(test, "test_masks", config)
        reader = MaskReader(config.ignore, config.reduce_zero_label)
        names = None if config.names is None else read_names(config.names)
        train = read_masked(data, config.masks, images, reader, "--data", names)
        if len(train.class_names) < 2:
            raise ConfigError(f"masks={config.masks!r} hold one class; expected two or more, or names=FILE")
        if test is None or config.test_masks is None:
            return train.hold_out(config.test_share, config.seed)
        tested = read_masked(test, config.test_masks, images, reader, "--test", train.class_names)
        if tested.index.root == train.index.root:
            raise ConfigError(
                f"--test {test} is --data; expected other images, or no --test: test_share are held out"
            )
        return train, tested

    def write(self, job: Job, outcome: Segmentation, title: str) -> dict[str, Any]:
        """The scores, confusion.png, and predictions.png where some are asked for."""
        names = job.train.class_names
        told = summary(outcome, names)
        line = f"{title} {job.config.head}: {self.headline(told | {'test': job.test.described()})}"
        # A matrix of few classes is narrow.
        draw_confusion(job.folder / CONFUSION, outcome.matrix, names, line.replace(", ", "\n"))
        if outcome.samples:
            draw_samples(job.folder / PREDICTIONS, outcome.samples, names, line)
        return told

    def headline(self, told: dict[str, Any]) -> str:
        """Mean IoU and the accuracy of pixels."""
        return (
            f"mIoU {told['miou']:.2%} of {told['test']['classes']} classes, pixel accuracy "
            f"{told['pixel_accuracy']:.2%}, {told['test']['images']:,} test images"
        )


def evaluate_segment(job: Job) -> Segmentation:
    """Train a head, and the encoder where that is asked for, on the training images; predict the test images.

    Raises:
        ConfigError: a training that makes no sense, such as one without steps.
    """
    config, device = job.config, job.ranks.device
    upernet = config.head == "upernet"
    encoder = DenseEncoder(
        job.encoder,
        job.trained,
        # A linear layer stands on what the methods train: the last output after its norm.
        blocks=None if upernet else [job.trained.model.depth],
        normalised=not upernet,
        trainable=config.trainable,
        drop_path=config.drop_path if config.trainable else None,
    )
    head = build_head(config, encoder.width, len(job.train.class_names))
    model = Segmenter(encoder, head, config.precision).to(device)
    losses = train_segmenter(model, job)
    matrix, samples = _tested(model, job)
    last = losses[-max(1, round(len(job.train) / config.batch_size)) :]
    finite = [loss for loss in last if math.isfinite(loss)]
    train_loss = sum(finite) / len(finite) if finite else None
    return Segmentation(matrix, samples, {"steps": len(losses), "train_loss": train_loss})


def _tested(model: Segmenter, job: Job) -> tuple[torch.Tensor, list[Sample]]:
    """The confusion of all test images, and rank 0's first ones as they are drawn."""
    images, ranks, kinds = job.test, job.ranks, len(job.train.class_names)
    own = images.take(slice(ranks.rank, None, ranks.world_size))
    matrix = torch.zeros(kinds, kinds, dtype=torch.int64, device=ranks.device)
    samples: list[Sample] = []
    predictions = predict(model, own, job.trained.data, job.config, ranks.device) if len(own) else ()
    for row, predicted in zip(own.rows.tolist(), predictions, strict=True):
        classes = own.read(own.paths[row])
        matrix += count_pixels(torch.from_numpy(classes).long().to(ranks.device), predicted, kinds)
        if ranks.first and len(samples) < job.config.pictures:
            samples.append(_sample(own, row, job.trained.data, classes, predicted.cpu().numpy()))
    return torch.stack(ranks.gather(matrix.cpu())).sum(0), samples


def _sample(
    images: MaskedImages, row: int, data: DataConfig, classes: np.ndarray, predicted: np.ndarray
) -> Sample:
    """An image with its masks, no larger than can be seen."""
    size = np.array(classes.shape)
    size = np.maximum(1, np.rint(size * min(1, _MOST_DRAWN / size.max()))).astype(np.int64)
    places = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(size, classes.shape, strict=True)
    )
    taken = np.ix_(*places)
    data = data.model_copy(update={"image_size": tuple(size.tolist())})
    plan = centre_plan(images.index, np.array([row]), data, side=1.0)
    (image,) = next(decode(images.index, data, plan, 1, torch.device("cpu")))
    return Sample(image.numpy().copy(), classes[taken].astype(np.int64), predicted[taken])
