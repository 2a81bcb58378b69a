"""Nearest neighbours against every pair in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmim.evaluate.knn import votes


def naive_votes(queries, keys, labels, classes, k, temperature):
    """One query at a time; votes relative to the nearest."""
    told = np.zeros((len(queries), classes))
    for row, query in enumerate(queries):
        cosines = [float(query @ key) for key in keys]
        for near in sorted(range(len(keys)), key=lambda i: -cosines[i])[:k]:
            told[row, labels[near]] += np.exp((cosines[near] - max(cosines)) / temperature)
    return told


@pytest.mark.parametrize(
    "k, temperature, block", [(1, 0.07, 7), (20, 0.07, 16), (33, 1.0, 10), (50, 0.5, 1000)]
)
def test_votes_are_those_of_all_pairs(k, temperature, block):
    torch.manual_seed(k)
    queries, keys = F.normalize(torch.randn(9, 6), dim=1), F.normalize(torch.randn(50, 6), dim=1)
    labels = torch.randint(4, (50,))
    told = votes(queries, keys, labels, 4, k, temperature, block)
    exact = naive_votes(queries.double().numpy(), keys.double().numpy(), labels.tolist(), 4, k, temperature)
    np.testing.assert_allclose(told.numpy(), exact, rtol=1e-4, atol=1e-7)


def test_with_the_smallest_temperature_the_nearest_alone_votes():
    keys = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1]]), dim=1)
    told = votes(torch.tensor([[0.8, 0.6]]), keys, torch.tensor([2, 0, 0]), 3, 3, 1e-4)
    assert told.tolist() == [[0, 0, 1]]
