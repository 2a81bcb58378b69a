"""Logistic regression against scipy's minimiser, on an objective and gradient of its own."""

import logging

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from fastmim.evaluate.logistic import fit_logistic

N, WIDTH, CLASSES = 60, 5, 3


def by_scipy(features, labels, l2):
    """Class probabilities [N, CLASSES] of the optimum."""
    x = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-6)
    right = np.eye(CLASSES)[labels]

    def objective(flat):
        weight, bias = flat[:-CLASSES].reshape(WIDTH, CLASSES), flat[-CLASSES:]
        logits = x @ weight + bias
        loss = (logsumexp(logits, axis=1) - (logits * right).sum(1)).mean() + l2 / 2 * (weight**2).sum()
        pull = (softmax(logits, axis=1) - right) / len(x)
        return loss, np.concatenate([(x.T @ pull + l2 * weight).ravel(), pull.sum(0)])

    found = minimize(
        objective, np.zeros((WIDTH + 1) * CLASSES), jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    weight, bias = found.x[:-CLASSES].reshape(WIDTH, CLASSES), found.x[-CLASSES:]
    return softmax(x @ weight + bias, axis=1)


def problem():
    random = np.random.default_rng(3)
    labels = random.integers(CLASSES, size=N)
    # One column is constant, and the scales differ: standardising has to cope with both.
    features = (
        random.normal(size=(N, WIDTH)) * [1, 100, 0.01, 0, 1] + labels[:, None] * [1, 0, 0.01, 0, 0] + 7
    )
    return features.astype(np.float32), labels


@pytest.mark.parametrize("l2", [1e-3, 0.3])
def test_it_finds_the_optimum(l2):
    features, labels = problem()
    model = fit_logistic(torch.tensor(features), torch.tensor(labels), CLASSES, l2, 1000)
    assert model.converged
    told = model(torch.tensor(features)).softmax(1).numpy()
    np.testing.assert_allclose(told, by_scipy(features.astype(np.float64), labels, l2), atol=1e-4)


def test_separable_classes_converge_and_too_few_iterations_are_told(caplog):
    features, labels = torch.eye(3).repeat(4, 1) * 9, torch.arange(3).repeat(4)
    model = fit_logistic(features, labels, 3, 1e-4, 1000)
    assert model.converged and (model(features).argmax(1) == labels).all()
    features, labels = problem()
    with caplog.at_level(logging.WARNING, "fastmim"):
        model = fit_logistic(torch.tensor(features), torch.tensor(labels), CLASSES, 1e-3, 2)
    assert not model.converged and "max_iterations=2" in caplog.text
