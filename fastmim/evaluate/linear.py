"""Linear probing: several heads in one pass over augmented images, or an exact solution for centre crops."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.config_training import OptimConfig
from fastmim.evaluate.config import LinearConfig
from fastmim.evaluate.features import FeatureExtractor, regroup
from fastmim.evaluate.job import Job
from fastmim.evaluate.labels import LabelledImages
from fastmim.evaluate.lars import Lars
from fastmim.evaluate.logistic import LogisticRegression, fit_logistic
from fastmim.evaluate.resume import State
from fastmim.evaluate.scores import Outcome
from fastmim.evaluate.sweep import accuracy_of, outcome_of_best, steps_in_epoch, with_chooser
from fastmim.optim import learning_rate

_EPS = 1e-6
_INITIAL_STD = 0.01


def evaluate_linear(job: Job) -> Outcome:
    """Classify by a linear layer on frozen features.

    Of several learning rates (or `l2`), the one that is best on a held-out share of the training images is taken;
    the test images decide nothing.

    Raises:
        ConfigError: fewer training images than a step takes.
    """
    extractor = FeatureExtractor.of(job)
    if job.config.solver == "exact":
        return evaluate_exact(extractor, job.train, job.test, job.config)
    return _evaluate_lars(extractor, job)


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
    extractor: FeatureExtractor, train: LabelledImages, config: LinearConfig, state: State | None = None
) -> tuple[Heads, list[float]]:
    """Train a head for each learning rate on the same views.

    Args:
        extractor: of the views' features.
        train: what to train on.
        config: of the protocol.
        state: where each finished epoch is kept, and what it goes on from; without it nothing is kept.

    Returns:
        The heads, for evaluation, and their mean losses in the last epoch.
    """
    assert config.epochs is not None, "not resolved"
    steps = steps_in_epoch(train, config, " (solver=exact needs no batches)")
    device = extractor.device
    heads = Heads(len(config.blr), extractor.width, len(train.class_names), config.seed).to(device)
    lars = Lars([heads.weight, heads.bias], config.momentum, config.weight_decay)
    peaks = torch.tensor(config.blr, device=device) * config.batch_size / 256
    # Of a peak of 1: every head has the same schedule.
    spans = {"epochs": config.epochs, "warmup_epochs": config.warmup_epochs}
    schedule = OptimConfig.model_validate({"blr": 1.0, "batch_size": 256, **spans})
    total = torch.zeros(len(config.blr), device=device)
    first = 0
    if state is not None and (found := state.load()) is not None:
        heads.load_state_dict(found["heads"])
        lars.load_velocities(found["velocities"])
        total.copy_(found["total"])
        first = found["epoch"]
    for epoch in range(first, config.epochs):
        total.zero_()
        batches = regroup(extractor.epoch(train, epoch, config), config.batch_size)
        for step, (features, labels) in enumerate(batches):
            logits = heads(features).flatten(0, 1)
            losses = F.cross_entropy(logits, labels.repeat(len(config.blr)), reduction="none")
            losses = losses.view(len(config.blr), -1).mean(1)
            losses.sum().backward()
            lars.step(peaks * learning_rate(schedule, epoch + step / steps))
            total += losses.detach()
        if state is not None:
            kept = {"heads": heads.state_dict(), "velocities": lars.velocities, "total": total}
            state.save({"epoch": epoch + 1, **kept})
    return heads.eval(), (total / steps).tolist()


def _evaluate_lars(extractor: FeatureExtractor, job: Job) -> Outcome:
    config, test = job.config, job.test
    train, chooser = with_chooser(job.train, config)
    heads, losses = train_heads(extractor, train, config, State(job, "linear"))
    with torch.no_grad():
        tried = []
        if chooser is not None:
            tried = [
                accuracy_of(logits, chooser) for logits in heads(extractor.centre(chooser, "validation"))
            ]
        logits = heads(extractor.centre(test, "test"))
    rows = [
        {"blr": blr, "train_loss": loss if math.isfinite(loss) else None}
        for blr, loss in zip(config.blr, losses, strict=True)
    ]
    return outcome_of_best(rows, tried, list(logits), test)


def evaluate_exact(
    extractor: FeatureExtractor, train: LabelledImages, test: LabelledImages, config: LinearConfig
) -> Outcome:
    """As `evaluate_linear` with `solver=exact`, by an extractor's features."""
    train, chooser = with_chooser(train, config)
    features = extractor.centre(train, "train")
    labels = torch.from_numpy(train.labels).to(extractor.device)
    classes = len(train.class_names)
    models = [fit_logistic(features, labels, classes, l2, config.max_iterations) for l2 in config.l2]
    tried = []
    if chooser is not None:
        asked = extractor.centre(chooser, "validation")
        tried = [accuracy_of(model(asked), chooser) for model in models]
    features = extractor.centre(test, "test")
    rows = [{"l2": l2, **convergence(model)} for l2, model in zip(config.l2, models, strict=True)]
    return outcome_of_best(rows, tried, [model(features) for model in models], test)


def convergence(model: LogisticRegression) -> dict[str, Any]:
    """What eval.json tells of how exact a solution is."""
    return {"converged": model.converged, "gradient": model.gradient}
