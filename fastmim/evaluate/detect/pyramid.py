"""Five scales made of an encoder's last map, and the backbone that torchvision's detectors stand on."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from fastmim.evaluate.dense import DenseEncoder

SCALES = (4.0, 2.0, 1.0, 0.5)
"""Sizes of the levels over that of the map; a fifth is half as large as the last."""
LEVELS = ("0", "1", "2", "3", "pool")


class SimpleFeaturePyramid(nn.Module):
    """Levels made of one map each by itself: x4 and x2 by transposed convolutions, x1, /2 by pooling; then 1x1 and 3x3.

    Args:
        width: D, channels of the map.
        out: channels of every level.

    Source: ViTDet (Li et al., ECCV 2022), section 3 and figure 2d; the layers are those of its code.
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        scaled: list[tuple[nn.Module, int]] = [
            (
                nn.Sequential(
                    nn.ConvTranspose2d(width, width // 2, 2, stride=2),
                    LayerNorm2d(width // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
                ),
                width // 4,
            ),
            (nn.ConvTranspose2d(width, width // 2, 2, stride=2), width // 2),
            (nn.Identity(), width),
            (nn.MaxPool2d(2), width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(channels, out, 1, bias=False),
                LayerNorm2d(out),
                nn.Conv2d(out, out, 3, padding=1, bias=False),
                LayerNorm2d(out),
            )
            for scale, channels in scaled
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [B, D, h, w], h and w multiples of 4 -> [B, out, s h, s w] of each of `SCALES`, and of s = 1/4."""
        levels = [level(x) for level in self.levels]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


class PyramidBackbone(nn.Module):
    """An encoder and a pyramid, as torchvision's detectors want them.

    Args:
        encoder: of one map.
        width: channels of every level.
        precision: bf16, by autocast, or fp32; the levels are float32.

    Attributes:
        out_channels: `width`.
    """

    def __init__(self, encoder: DenseEncoder, width: int, precision: str = "fp32"):
        super().__init__()
        self.encoder, self.pyramid = encoder, SimpleFeaturePyramid(encoder.width, width)
        self.out_channels, self.precision = width, precision

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """images uint8 [B, C, H, W] -> float32 levels by name, finest first."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            levels = self.pyramid(self.encoder(images.permute(0, 2, 3, 1).contiguous())[-1])
        return OrderedDict(zip(LEVELS, (level.float() for level in levels), strict=True))
