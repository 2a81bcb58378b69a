"""LARS against its formula in float64, one network at a time."""

import numpy as np
import torch

from fastmim.evaluate.lars import Lars


def lars_by_formula(weight, bias, gradients, rates, momentum, decay, trust):
    """You et al., algorithm 1: lists of (weight gradient, bias gradient) and of learning rates, numpy float64."""
    weight, bias = weight.copy(), bias.copy()
    fast, slow = np.zeros_like(weight), np.zeros_like(bias)
    for (of_weight, of_bias), rate in zip(gradients, rates, strict=True):
        step = of_weight + decay * weight
        size, length = np.sqrt((weight**2).sum()), np.sqrt((step**2).sum())
        fast = momentum * fast + (step * (trust * size / length) if size > 0 and length > 0 else step)
        slow = momentum * slow + of_bias
        weight, bias = weight - rate * fast, bias - rate * slow
    return weight, bias


def test_every_network_follows_the_formula_with_its_own_norms_and_rate():
    random = np.random.default_rng(0)
    heads, steps, momentum, decay, trust = 3, 5, 0.9, 0.01, 0.02
    weight = random.normal(size=(heads, 6, 4)) * np.array([1.0, 30.0, 0.0])[:, None, None]  # one starts at 0
    bias = random.normal(size=(heads, 4))
    gradients = [(random.normal(size=weight.shape), random.normal(size=bias.shape)) for _ in range(steps)]
    gradients[0][0][0] = 0
    rates = random.uniform(0.1, 2, size=(steps, heads))
    parameters = [torch.tensor(value, requires_grad=True) for value in (weight, bias)]
    lars = Lars(parameters, momentum, decay, trust)
    for given, rate in zip(gradients, rates, strict=True):
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = torch.tensor(gradient)
        lars.step(torch.tensor(rate))
    assert all(parameter.grad is None for parameter in parameters)
    for head in range(heads):
        own = [(w[head], b[head]) for w, b in gradients]
        wanted = lars_by_formula(weight[head], bias[head], own, rates[:, head], momentum, decay, trust)
        for parameter, exact in zip(parameters, wanted, strict=True):
            np.testing.assert_allclose(parameter[head].detach().numpy(), exact, rtol=1e-12, atol=1e-14)
