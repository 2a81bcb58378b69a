"""Multinomial logistic regression solved to its optimum, for sets whose features fit in memory."""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6
_FLAT = 1e-6

logger = logging.getLogger("fastmim")


@dataclass(frozen=True)
class LogisticRegression:
    """A linear classifier of standardised features.

    Attributes:
        mean, scale: float64 [D], of the training features.
        weight: float64 [D, C].
        bias: float64 [C].
        gradient: largest absolute entry of the gradient that was left.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    gradient: float

    @property
    def converged(self) -> bool:
        """Whether the optimum was reached."""
        return self.gradient <= _FLAT

    def __call__(self, features: Tensor) -> Tensor:
        """Logits, float64 [n, C], of features [n, D]."""
        return (features.double() - self.mean) * self.scale @ self.weight + self.bias


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, l2: float, max_iterations: int
) -> LogisticRegression:
    """The minimum of mean cross-entropy + l2 / 2 |weight|^2, by L-BFGS in float64.

    Features are standardised as BatchNorm without affine does (eps 1e-6), by their own mean and variance. The
    minimum is unique but for a constant in the biases; equal inputs give equal bits.

    Args:
        features: [n, D].
        labels: int64 [n].
        classes: C.
        l2: above 0; the bias is not regularised.
        max_iterations: of L-BFGS.
    """
    x = features.double()
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    scale = (variance + _EPS).rsqrt()
    x = (x - mean) * scale
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        tolerance_grad=_FLAT,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
        closure()
    gradient = max(p.grad.abs().max().item() for p in (weight, bias) if p.grad is not None)
    if gradient > _FLAT:
        logger.warning(
            "L-BFGS stopped after max_iterations=%d with a gradient of %.1e; expected at most %.0e",
            max_iterations,
            gradient,
            _FLAT,
        )
    return LogisticRegression(mean, scale, weight.detach(), bias.detach(), gradient)
