"""Linear probing against one head trained alone in float64, and batches that keep every view in order."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmim.errors import ConfigError
from fastmim.evaluate.config import LinearConfig
from fastmim.evaluate.features import regroup
from fastmim.evaluate.linear import Heads, train_heads
from fastmim.evaluate.sweep import outcome_of_best

WIDTH, CLASSES, BATCH = 6, 3, 10


class Views:
    """Stands for an extractor: features of epochs, in parts of uneven size."""

    device, width = torch.device("cpu"), WIDTH

    def epoch(self, train, epoch, config):
        random = np.random.default_rng(epoch)
        labels = random.permutation(train.labels)
        features = random.normal(size=(len(labels), WIDTH)) * 3 + np.eye(CLASSES, WIDTH)[labels] * 4 + 1
        features, labels = torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
        yield from zip(features.split(7), labels.split(7), strict=True)


class Train:
    labels, class_names = np.arange(25) % CLASSES, ("a", "b", "c")

    def __len__(self):
        return len(self.labels)


def train_alone(config, blr):
    """One head in float64 by MAE's recipe: BatchNorm, LARS on the matrix, plain momentum on the bias."""
    weight = Heads(1, WIDTH, CLASSES, config.seed).weight[0].detach().double().requires_grad_()
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    norm = torch.nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6).double()
    seen = []
    fast, slow = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch in range(config.epochs):
        parts = list(Views().epoch(Train(), epoch, config))
        features, labels = torch.cat([x for x, _ in parts]).double(), torch.cat([y for _, y in parts])
        for step in range(2):  # 25 images are two batches of 10, and 5 are dropped
            rows = slice(step * BATCH, (step + 1) * BATCH)
            seen.append(features[rows])
            loss = F.cross_entropy(norm(features[rows]) @ weight + bias, labels[rows])
            of_weight, of_bias = torch.autograd.grad(loss, [weight, bias])
            where, warmup = epoch + step / 2, config.warmup_epochs
            share = (
                where / warmup
                if where < warmup
                else 0.5 * (1 + math.cos(math.pi * (where - warmup) / (config.epochs - warmup)))
            )
            rate = blr * BATCH / 256 * share
            with torch.no_grad():
                fast = 0.9 * fast + of_weight * (0.001 * weight.norm() / of_weight.norm())
                slow = 0.9 * slow + of_bias
                weight -= rate * fast
                bias -= rate * slow
    return seen, weight, bias


def test_heads_side_by_side_are_heads_trained_alone():
    config = LinearConfig(blr=[0.5, 10.0], batch_size=BATCH, epochs=6, warmup_epochs=2)
    heads, losses = train_heads(Views(), Train(), config)
    assert len(set(losses)) == 2
    for head, blr in enumerate(config.blr):
        seen, weight, bias = train_alone(config, blr)
        torch.testing.assert_close(
            heads.weight[head].detach().double(), weight.detach(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(heads.bias[head].detach().double(), bias.detach(), rtol=1e-4, atol=1e-5)
    mean, variance = (
        torch.stack([value(x) for x in seen]).mean(0) for value in (lambda x: x.mean(0), lambda x: x.var(0))
    )
    torch.testing.assert_close(heads.norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heads.norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)


def test_the_test_images_decide_nothing():
    right, wrong = torch.eye(CLASSES)[Train.labels], torch.eye(CLASSES)[(Train.labels + 1) % CLASSES]
    told = outcome_of_best([{}, {}, {}], [0.2, 0.9, 0.5], [right, wrong, right], Train())
    assert [row["chosen"] for row in told.details["sweep"]] == [False, True, False]
    assert [row["test_top1"] for row in told.details["sweep"]] == [1, 0, 1]
    assert torch.equal(told.best[:, 0], wrong.argmax(1))


def test_regrouping_keeps_the_order_and_drops_the_rest():
    for parts in ([7, 7, 7, 4], [25], [3] * 8 + [1], [10, 10, 5]):
        rows = torch.arange(25)
        batches = list(regroup(zip(rows[:, None].split(parts), rows.split(parts), strict=True), 10))
        assert [labels.tolist() for _, labels in batches] == [list(range(10)), list(range(10, 20))]
        assert all(torch.equal(features[:, 0], labels) for features, labels in batches)


@pytest.mark.parametrize(("depth", "epochs"), [(12, 90), (23, 90), (24, 50), (32, 50)])
def test_the_paper_s_epochs_go_by_the_depth(depth, epochs, tiny_config):
    trained = tiny_config(f"model.depth={depth}")
    assert LinearConfig().resolved(trained).epochs == epochs
    assert LinearConfig(epochs=7, warmup_epochs=1).resolved(trained).epochs == 7
    assert LinearConfig(solver="exact").resolved(trained).epochs is None
    with pytest.raises(
        ConfigError, match=rf"warmup_epochs=90; expected less than the {epochs} epochs of an encoder"
    ):
        LinearConfig(warmup_epochs=90).resolved(trained)
