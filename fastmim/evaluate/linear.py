"""Linear probing: several heads in one pass over augmented images, or an exact solution for centre crops."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.config import OptimConfig
from fastmim.errors import ConfigError
from fastmim.evaluate.config import LinearConfig
from fastmim.evaluate.features import FeatureExtractor
from fastmim.evaluate.labels import LabelledImages, hold_out
from fastmim.evaluate.lars import Lars
from fastmim.evaluate.logistic import LogisticRegression, fit_logistic
from fastmim.evaluate.scores import Outcome, best_classes
from fastmim.optim import learning_rate

_EPS = 1e-6
_INITIAL_STD = 0.01


def evaluate_linear(
    extractor: FeatureExtractor, train: LabelledImages, test: LabelledImages, config: LinearConfig
) -> Outcome:
    """Classify by a linear layer on frozen features.

    Of several learning rates (or `l2`), the one that is best on a held-out share of the training images is taken;
    the test images decide nothing.

    Raises:
        ConfigError: fewer training images than a step takes.
    """
    return (_evaluate_lars if config.solver == "lars" else _evaluate_exact)(extractor, train, test, config)


class Heads(nn.Module):
    """BatchNorm without affine, then several linear layers side by side.

    Args:
        heads: H.
        width: D, of the features.
        classes: C.
        seed: of the initial weights; every head starts from the same.
    """

    def __init__(self, heads: int, width: int, classes: int, seed: int):
        super().__init__()
        # Frozen features have fixed statistics: their mean over all steps, where a decaying one would keep a part of
        # its start in a short run.
        self.norm = nn.BatchNorm1d(width, affine=False, eps=_EPS, momentum=None)
        generator = torch.Generator().manual_seed(seed)
        weight = nn.init.trunc_normal_(torch.empty(width, classes), std=_INITIAL_STD, generator=generator)
        self.weight = nn.Parameter(weight.repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [H, B, C] of features [B, D]."""
        x = self.norm(features).expand(len(self.weight), -1, -1)
        return torch.baddbmm(self.bias[:, None], x, self.weight)


def train_heads(
    extractor: FeatureExtractor, train: LabelledImages, config: LinearConfig
) -> tuple[Heads, list[float]]:
    """Train a head for each learning rate on the same views.

    Returns:
        The heads, for evaluation, and their mean losses in the last epoch.
    """
    steps = len(train) // config.batch_size
    if not steps:
        raise ConfigError(
            f"batch_size={config.batch_size}; expected at most the {len(train)} training images "
            "(solver=exact needs no batches)"
        )
    device = extractor.device
    heads = Heads(len(config.blr), extractor.width, len(train.class_names), config.seed).to(device)
    lars = Lars([heads.weight, heads.bias], config.momentum, config.weight_decay)
    peaks = torch.tensor(config.blr, device=device) * config.batch_size / 256
    # Of a peak of 1: every head has the same schedule.
    spans = {"epochs": config.epochs, "warmup_epochs": config.warmup_epochs}
    schedule = OptimConfig.model_validate({"blr": 1.0, "batch_size": 256, **spans})
    total = torch.zeros(len(config.blr), device=device)
    for epoch in range(config.epochs):
        total.zero_()
        batches = _regroup(extractor.epoch(train, epoch, config), config.batch_size)
        for step, (features, labels) in enumerate(batches):
            logits = heads(features).flatten(0, 1)
            losses = F.cross_entropy(logits, labels.repeat(len(config.blr)), reduction="none")
            losses = losses.view(len(config.blr), -1).mean(1)
            losses.sum().backward()
            lars.step(peaks * learning_rate(schedule, epoch + step / steps))
            total += losses.detach()
    return heads.eval(), (total / steps).tolist()


def _regroup(parts: Iterator[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of exactly `size` from smaller or larger ones; the images that are left at the end are dropped."""
    features, labels, held = [], [], 0
    for some, their in parts:
        features.append(some)
        labels.append(their)
        held += len(some)
        if held < size:
            continue
        whole, kinds = torch.cat(features), torch.cat(labels)
        for first in range(0, held - size + 1, size):
            yield whole[first : first + size], kinds[first : first + size]
        held %= size
        features, labels = [whole[len(whole) - held :]], [kinds[len(kinds) - held :]]


def _evaluate_lars(
    extractor: FeatureExtractor, train: LabelledImages, test: LabelledImages, config: LinearConfig
) -> Outcome:
    train, chooser = _with_chooser(train, config, len(config.blr))
    heads, losses = train_heads(extractor, train, config)
    with torch.no_grad():
        tried = []
        if chooser is not None:
            tried = [_accuracy(logits, chooser) for logits in heads(extractor.centre(chooser))]
        logits = heads(extractor.centre(test))
    rows = [
        {"blr": blr, "train_loss": loss if math.isfinite(loss) else None}
        for blr, loss in zip(config.blr, losses, strict=True)
    ]
    return _outcome(rows, tried, list(logits), test)


def _evaluate_exact(
    extractor: FeatureExtractor, train: LabelledImages, test: LabelledImages, config: LinearConfig
) -> Outcome:
    train, chooser = _with_chooser(train, config, len(config.l2))
    features, labels = extractor.centre(train), torch.from_numpy(train.labels).to(extractor.device)
    classes = len(train.class_names)
    models = [fit_logistic(features, labels, classes, l2, config.max_iterations) for l2 in config.l2]
    tried = []
    if chooser is not None:
        asked = extractor.centre(chooser)
        tried = [_accuracy(model(asked), chooser) for model in models]
    features = extractor.centre(test)
    rows = [{"l2": l2, **convergence(model)} for l2, model in zip(config.l2, models, strict=True)]
    return _outcome(rows, tried, [model(features) for model in models], test)


def convergence(model: LogisticRegression) -> dict[str, Any]:
    """What eval.json tells of how exact a solution is."""
    return {"converged": model.converged, "gradient": model.gradient}


def _with_chooser(
    train: LabelledImages, config: LinearConfig, candidates: int
) -> tuple[LabelledImages, LabelledImages | None]:
    """The images to train on, and those that choose where there is a choice."""
    if candidates == 1:
        return train, None
    return hold_out(train, config.validation, config.seed, "validation")


def _accuracy(logits: Tensor, images: LabelledImages) -> float:
    return (logits.argmax(1).cpu() == torch.from_numpy(images.labels)).double().mean().item()


def _outcome(
    rows: list[dict[str, Any]], tried: list[float], logits: list[Tensor], test: LabelledImages
) -> Outcome:
    chosen = max(range(len(rows)), key=lambda i: tried[i]) if tried else 0
    for i, row in enumerate(rows):
        row |= {"validation_top1": tried[i]} if tried else {}
        row |= {"test_top1": _accuracy(logits[i], test), "chosen": i == chosen}
    return Outcome(best_classes(logits[chosen]), torch.from_numpy(test.labels), {"sweep": rows})
