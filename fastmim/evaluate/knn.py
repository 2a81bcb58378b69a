"""Weighted nearest neighbours: every test image against every training image, in blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.errors import ConfigError
from fastmim.evaluate.config import KnnConfig
from fastmim.evaluate.features import FeatureExtractor
from fastmim.evaluate.job import Job
from fastmim.evaluate.labels import LabelledImages
from fastmim.evaluate.scores import Outcome, best_classes

_TEST_BLOCK, _TRAIN_BLOCK = 512, 16384


def evaluate_knn(job: Job) -> Outcome:
    """Classify by the votes of the nearest training images.

    Raises:
        ConfigError: more neighbours than training images.
    """
    return ask_neighbours(FeatureExtractor.of(job), job.train, job.test, job.config)


def ask_neighbours(
    extractor: FeatureExtractor, train: LabelledImages, test: LabelledImages, config: KnnConfig
) -> Outcome:
    """As `evaluate_knn`, by an extractor's features."""
    if config.k > len(train):
        raise ConfigError(f"k={config.k}; expected at most the {len(train)} training images")
    keys, queries = (
        F.normalize(extractor.centre(images, name), dim=1)
        for images, name in ((train, "train"), (test, "test"))
    )
    labels = torch.from_numpy(train.labels).to(keys.device)
    classes = len(train.class_names)
    best = [
        best_classes(votes(block, keys, labels, classes, config.k, config.temperature))
        for block in queries.split(_TEST_BLOCK)
    ]
    return Outcome(torch.cat(best), torch.from_numpy(test.labels))


def votes(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor,
    classes: int,
    k: int,
    temperature: float,
    block: int = _TRAIN_BLOCK,
) -> Tensor:
    """Each class's votes: the sum of exp(cosine / temperature) over those of the k nearest keys that are of it.

    Args:
        queries: float32 [q, D], of norm 1.
        keys: float32 [n, D], of norm 1.
        labels: int64 [n], of the keys.
        classes: C.
        k: at most n.
        temperature: above 0.
        block: keys that are compared at once; memory is q x block.

    Returns:
        float32 [q, C], relative to the vote of the query's nearest key: no temperature overflows.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
        section 3.4.
    """
    near = queries.new_empty(len(queries), 0)
    kinds = labels.new_empty(len(queries), 0)
    for some, their in zip(keys.split(block), labels.split(block), strict=True):
        near = torch.cat([near, queries @ some.T], dim=1)
        kinds = torch.cat([kinds, their.expand(len(queries), -1)], dim=1)
        near, places = near.topk(min(k, near.shape[1]), dim=1)
        kinds = kinds.gather(1, places)
    weights = ((near - near[:, :1]) / temperature).exp()
    # A product instead of scatter_add, whose order of sums on a GPU is not fixed.
    return torch.bmm(weights[:, None], F.one_hot(kinds, classes).to(weights.dtype))[:, 0]
