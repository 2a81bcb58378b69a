"""The pixel statistics that turn bytes into network inputs and targets."""

import torch
from torch import Tensor

from fastmim.models.statistics import Statistics


class PixelScale(Statistics):
    """Per-channel mean and std in units where white is 1.

    Attributes:
        mean, std: float32 [C].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Bytes [..., C] as float32 in normalised units."""
        return (images.float() / 255 - self.mean) / self.std

    def to_bytes(self, values: Tensor) -> Tensor:
        """Normalised values [..., C] as uint8."""
        return ((values * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)
