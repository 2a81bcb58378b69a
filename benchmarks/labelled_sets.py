"""The labelled sets that an encoder's worth is measured on, and what the classifiers are given of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastmim.config import Config
from fastmim.data.demo import LABELS, prepare_elpv
from fastmim.data.idx import FASHION_MNIST, prepare_idx
from fastmim.evaluate.batches import centre_plan, decode
from fastmim.evaluate.config import KnnConfig
from fastmim.evaluate.features import FeatureExtractor
from fastmim.evaluate.labels import LabelledImages, hold_out, read_labelled, with_classes_of
from fastmim.models import Encoder


@dataclass(frozen=True)
class LabelledSet:
    """A set, how it is pre-trained on, and how far a classifier is trained.

    Attributes:
        title: for tables.
        recipe: of pre-training on `train`.
        prepare: makes the sources; does nothing where they are.
        train, test: sources.
        labels, test_labels: of both.
        minutes: of pre-training.
        epochs: of fine-tuning, by share of the labels; a share that is not here is not fine-tuned.
        shares: of the labels.
        draws: how often a share below 1 is drawn for the classifiers of stored features.
        pool: what of an encoder's patches those classifiers are given.
    """

    title: str
    recipe: str
    prepare: Callable[[], object]
    train: str
    test: str
    labels: str
    test_labels: str
    minutes: float
    epochs: dict[float, int] = field(default_factory=dict)
    shares: tuple[float, ...] = (0.01, 0.1, 1.0)
    draws: int = 3
    pool: Literal["mean", "quadrants"] = "mean"

    def read(self, config: Config) -> tuple[LabelledImages, LabelledImages]:
        """The training and the test images."""
        train = read_labelled(self.train, config.data, self.labels, "train")
        return train, with_classes_of(read_labelled(self.test, config.data, self.test_labels, "test"), train)


def share_of(images: LabelledImages, share: float, draw: int) -> LabelledImages:
    """A share of each class, rounded, at least one image; each draw is another one."""
    return images if share == 1 else hold_out(images, share, draw, "share")[1]


class StoredFeatures:
    """Features of all images of a set, computed once; stands where a protocol asks a `FeatureExtractor`.

    Args:
        sets: images, and what computes their features, float32 [n, D].
        compute: called once for each of `sets`.
    """

    device = torch.device("cpu")

    def __init__(self, sets: tuple[LabelledImages, ...], compute: Callable[[LabelledImages], Tensor]):
        self._tables = {images.index.fingerprint: _table(images, compute(images).cpu()) for images in sets}

    def centre(self, images: LabelledImages, name: str | None = None) -> Tensor:
        """Features of some of the images, float32 [n, D], whatever they are called."""
        places, features = self._tables[images.index.fingerprint]
        return features[torch.from_numpy(places[images.rows])]


def _table(images: LabelledImages, features: Tensor) -> tuple[np.ndarray, Tensor]:
    places = np.full(len(images.index), -1)
    places[images.rows] = np.arange(len(images))
    return places, features


def features(encoder: Encoder, config: Config, pool: str) -> Callable[[LabelledImages], Tensor]:
    """What computes the features of whole images, float32 [n, D]."""
    return FeatureExtractor(encoder, config, KnnConfig(pool=pool, center=1.0, precision="auto")).centre


def pixels(config: Config) -> Callable[[LabelledImages], Tensor]:
    """What reads the pixels of whole images, of the size that an encoder sees, white as 1, [n, H x W x C]."""

    def compute(images: LabelledImages) -> Tensor:
        plan = centre_plan(images.index, images.rows, config.data, 1.0)
        parts = decode(images.index, config.data, plan, 64, StoredFeatures.device)
        return torch.cat([part.flatten(1).float() / 255 for part in parts])

    return compute


_FASHION, _CELLS = Path("data/fashion-mnist"), Path("data/elpv")

SETS = {
    "fashion_mnist": LabelledSet(
        title="Fashion-MNIST, 60,000 + 10,000 images of 28 × 28",
        recipe="fashion_mnist",
        prepare=lambda: prepare_idx(FASHION_MNIST, _FASHION),
        train=str(_FASHION / "train.npy"),
        test=str(_FASHION / "test.npy"),
        labels=str(_FASHION / "train_labels.npy"),
        test_labels=str(_FASHION / "test_labels.npy"),
        minutes=14,
        epochs={0.01: 15, 0.1: 3},
        pool="quadrants",
    ),
    "photographs": LabelledSet(
        title="Photographs of solar cells, whole or defective, 2,460 + 164 images at 96 × 96",
        recipe="quickstart",
        prepare=lambda: prepare_elpv(_CELLS),
        train=str(_CELLS / "train"),
        test=str(_CELLS / "heldout"),
        labels=str(_CELLS / LABELS),
        test_labels=str(_CELLS / LABELS),
        minutes=10,
        epochs={0.01: 40, 0.1: 20, 1.0: 4},
    ),
}
