"""Attentive probing: a learned query looks over the frozen patch features, before the linear layer."""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.config_training import OptimConfig
from fastmim.evaluate.config import AttentiveConfig
from fastmim.evaluate.features import FeatureExtractor, regroup
from fastmim.evaluate.job import Job
from fastmim.evaluate.labels import LabelledImages
from fastmim.evaluate.resume import State
from fastmim.evaluate.scores import Outcome
from fastmim.evaluate.sweep import accuracy_of, outcome_of_best, steps_in_epoch, with_chooser
from fastmim.optim import learning_rate

_EPS = 1e-6
_INITIAL_STD = 0.02


def evaluate_attentive(job: Job) -> Outcome:
    """Classify by one query's cross-attention over the patches and a linear layer.

    Of several learning rates, the one that is best on a held-out share of the training images is taken; the test
    images decide nothing.

    Raises:
        ConfigError: fewer training images than a step takes.
    """
    extractor, config = FeatureExtractor.of(job), job.config
    train, chooser = with_chooser(job.train, config)
    heads, losses = train_attentive(extractor, train, config, State(job, "attentive"))
    tried = []
    if chooser is not None:
        tried = [accuracy_of(logits, chooser) for logits in _logits(heads, extractor.centre_parts(chooser))]
    rows = [
        {"lr": lr, "train_loss": loss if math.isfinite(loss) else None}
        for lr, loss in zip(config.lr, losses, strict=True)
    ]
    return outcome_of_best(rows, tried, _logits(heads, extractor.centre_parts(job.test)), job.test)


def normalised(tokens: Tensor) -> Tensor:
    """Tokens [B, N, D] with mean 0 and variance 1 each, the part of a LayerNorm that has no parameters."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=_EPS)


class AttentiveHead(nn.Module):
    """One learned query's cross-attention over patches, BatchNorm without affine, and a linear layer.

    LayerNorms stand before the projections of query, keys and values; there is no MLP and no residual. Since the
    query is one and the same for all images, a head's scores are products with one direction, and its sum of values
    is the projection of the weighted sum of the patches: no key or value is computed or stored. What the keys'
    biases would add to a head's scores is the same for every patch, which softmax does not see: they have none.

    Args:
        width: D, of the patches.
        heads: of the attention; a divisor of D.
        classes: C.

    Source: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", IJCV 2024, section 4.1
        and appendix.
    """

    def __init__(self, width: int, heads: int, classes: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, width))
        self.norm_q = nn.LayerNorm(width, eps=_EPS)
        self.norm_k = nn.LayerNorm(width, eps=_EPS, bias=False)
        self.norm_v = nn.LayerNorm(width, eps=_EPS)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        # The query moves and its features with it: statistics are the mean over an epoch (`reset_running_stats`),
        # where a decaying one would keep a part of its start in a short run.
        self.norm = nn.BatchNorm1d(width, affine=False, eps=_EPS, momentum=None)
        self.fc = nn.Linear(width, classes)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw weights of a standard deviation of 0.02; biases are 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=_INITIAL_STD, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits [B, C] of `normalised` patches [B, N, D]."""
        query = self.q(self.norm_q(self.query)).view(self.heads, -1)
        keys = (self.k.weight * self.norm_k.weight).view(self.heads, query.shape[1], -1)
        directions = torch.einsum("hd,hdw->wh", query, keys) / math.sqrt(query.shape[1])
        shares = (patches @ directions).softmax(1)
        mixed = shares.mT @ patches * self.norm_v.weight + self.norm_v.bias  # [B, heads, D]; shares sum to 1
        values = torch.einsum("bhw,hdw->bhd", mixed, self.v.weight.view(self.heads, query.shape[1], -1))
        return self.fc(self.norm(self.proj(values.flatten(1) + self.v.bias)))


def train_attentive(
    extractor: FeatureExtractor, train: LabelledImages, config: AttentiveConfig, state: State | None = None
) -> tuple[list[AttentiveHead], list[float]]:
    """Train a query and a head for each learning rate on the same views.

    Args:
        extractor: of the views' features.
        train: what to train on.
        config: of the protocol.
        state: where each finished epoch is kept, and what it goes on from; without it nothing is kept.

    Returns:
        The heads, for evaluation, and their mean losses in the last epoch.
    """
    steps = steps_in_epoch(train, config)
    assert config.heads is not None, "not resolved for its encoder"
    heads = []
    for _ in config.lr:
        head = AttentiveHead(extractor.width, config.heads, len(train.class_names))
        head.initialise(torch.Generator().manual_seed(config.seed))
        heads.append(head.to(extractor.device))
    groups = [
        {"params": list(head.parameters()), "peak": lr} for head, lr in zip(heads, config.lr, strict=True)
    ]
    # Each step sets the rates.
    options = {"momentum": config.momentum, "nesterov": config.momentum > 0}
    optimizer = torch.optim.SGD(groups, lr=0.0, weight_decay=config.weight_decay, **options)
    # Of a peak of 1: every head has the same schedule.
    spans = {"epochs": config.epochs, "warmup_epochs": config.warmup_epochs}
    schedule = OptimConfig.model_validate({"blr": 1.0, "batch_size": 256, **spans})
    total = torch.zeros(len(heads), device=extractor.device)
    first = 0
    if state is not None and (found := state.load()) is not None:
        for head, stored in zip(heads, found["heads"], strict=True):
            head.load_state_dict(stored)
        optimizer.load_state_dict(found["optimizer"])
        total.copy_(found["total"])
        first = found["epoch"]
    for epoch in range(first, config.epochs):
        total.zero_()
        for head in heads:
            head.norm.reset_running_stats()
        views = ((normalised(patches), labels) for patches, labels in extractor.epoch(train, epoch, config))
        for step, (patches, labels) in enumerate(regroup(views, config.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(schedule, epoch + step / steps)
            losses = torch.stack([F.cross_entropy(head(patches), labels) for head in heads])
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            total += losses.detach()
        if state is not None:
            kept = {"heads": [head.state_dict() for head in heads], "optimizer": optimizer.state_dict()}
            state.save({"epoch": epoch + 1, "total": total, **kept})
    return [head.eval() for head in heads], (total / steps).tolist()


@torch.no_grad()
def _logits(heads: list[AttentiveHead], parts: Iterable[Tensor]) -> list[Tensor]:
    """Logits of each head, [n, C], of patches that come in parts."""
    rows: Iterator[list[Tensor]] = ([head(x) for head in heads] for x in map(normalised, parts))
    return [torch.cat(column) for column in zip(*rows, strict=True)]
