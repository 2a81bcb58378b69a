"""LARS, for several networks side by side."""

import torch
from torch import Tensor


class Lars:
    """Momentum SGD whose step of each matrix is proportional to the matrix's norm.

    Parameters carry several networks in their first dimension, each with norms and a learning rate of its own.
    Vectors (biases) are neither decayed nor rescaled.

    Args:
        parameters: [H, ...], with gradients when `step` is called.
        momentum: of the rescaled gradients.
        weight_decay: of matrices, before the rescaling.
        trust: the coefficient eta.

    Attributes:
        velocities: of each parameter, what a step adds to: with the parameters, all that the next one depends on.

    Source: You et al., "Large Batch Training of Convolutional Networks", 2017, algorithm 1, in the form that MoCo v3
        and MAE use: the learning rate multiplies the velocity, not the gradients that it is made of.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        self.parameters, self.momentum = parameters, momentum
        self.weight_decay, self.trust = weight_decay, trust
        self.velocities = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """Update every parameter and clear its gradient; `rates` [H] are the learning rates of this step."""
        for parameter, velocity in zip(self.parameters, self.velocities, strict=True):
            assert parameter.grad is not None, "a parameter without a gradient"
            update = self._rescaled(parameter, parameter.grad) if parameter.ndim > 2 else parameter.grad
            velocity.mul_(self.momentum).add_(update)
            parameter.sub_(velocity * _beside(rates, parameter))
            parameter.grad = None

    def load_velocities(self, velocities: list[Tensor]) -> None:
        """Take up where an optimiser with these velocities stopped."""
        for velocity, stored in zip(self.velocities, velocities, strict=True):
            velocity.copy_(stored)

    def _rescaled(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        update = gradient + self.weight_decay * parameter
        size, step = (value.flatten(1).norm(dim=1) for value in (parameter, update))
        # Where either norm is 0 their ratio says nothing, and the gradient is taken as it is.
        ratio = torch.where((size > 0) & (step > 0), self.trust * size / step, 1.0)
        return update * _beside(ratio, parameter)


def _beside(values: Tensor, parameter: Tensor) -> Tensor:
    """Values [H], shaped to multiply a parameter [H, ...]."""
    return values.view(-1, *(1,) * (parameter.ndim - 1))
