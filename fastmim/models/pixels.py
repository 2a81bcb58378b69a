"""The pixel statistics that turn bytes into network inputs and targets."""

import torch
from torch import Tensor, nn


class PixelScale(nn.Module):
    """Per-channel mean and std in units where white is 1, kept in float32 whatever the model's precision.

    Attributes:
        mean, std: float32 [C].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def _apply(self, fn, recurse=True):
        # `module.bfloat16()` would round the statistics, and with them every target; only the device may change.
        device = fn(torch.empty(0, device=self.mean.device)).device
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self
