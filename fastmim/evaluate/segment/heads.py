"""Heads that turn an encoder's maps into logits of classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from fastmim.evaluate.dense import SCALES

_POOLS = (1, 2, 3, 6)
_AUXILIARY_MAP, _AUXILIARY_WIDTH = 2, 256
_CLASSIFIER_STD = 0.01


class LinearHead(nn.Module):
    """BatchNorm and a linear layer on the last map (DINOv2, appendix B).

    Args:
        width: channels of the map.
        classes: K.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.classify = _classifier(width, classes)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps [B, D, h, w] -> logits [[B, K, h, w]]."""
        return [self.classify(self.norm(maps[-1]))]


class Pyramid(nn.Module):
    """Four scales of four maps of one size, as BEiT makes them: x4 and x2 by transposed convolutions, x1, and /2.

    Args:
        width: channels of each map.
    """

    def __init__(self, width: int):
        super().__init__()
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                ),
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four maps [B, D, h, w] -> [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w], [B, D, h/2, w/2]."""
        return [scale(each) for scale, each in zip(self.scales, maps, strict=True)]


class UPerNet(nn.Module):
    """Pyramid pooling of the smallest scale, fused with the larger ones from there down.

    Args:
        encoder_width: channels of the maps.
        width: channels inside.
        classes: K.
        dropout: of channels before the classifiers.
        auxiliary: with a convolutional head on the third map, whose logits come second; in training only.

    Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, figure 4; sizes of layers as
        in mmsegmentation.
    """

    def __init__(self, encoder_width: int, width: int, classes: int, dropout: float, auxiliary: bool):
        super().__init__()
        self.pyramid = Pyramid(encoder_width)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), Conv2dNormActivation(encoder_width, width, 1))
            for pool in _POOLS
        )
        self.bottleneck = Conv2dNormActivation(encoder_width + len(_POOLS) * width, width, 3)
        self.laterals = nn.ModuleList(
            Conv2dNormActivation(encoder_width, width, 1) for _ in range(SCALES - 1)
        )
        self.smooth = nn.ModuleList(Conv2dNormActivation(width, width, 3) for _ in range(SCALES - 1))
        self.fuse = Conv2dNormActivation(SCALES * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = _classifier(width, classes)
        self.auxiliary = (
            nn.Sequential(
                Conv2dNormActivation(encoder_width, _AUXILIARY_WIDTH, 3),
                nn.Dropout2d(dropout),
                _classifier(_AUXILIARY_WIDTH, classes),
            )
            if auxiliary
            else None
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four maps [B, D, h, w] -> logits [[B, K, 4h, 4w]], and those of the auxiliary head [B, K, h, w]."""
        *larger, smallest = self.pyramid(maps)
        pooled = [_resized(pool(smallest), smallest) for pool in self.pools]
        x = self.bottleneck(torch.cat([smallest, *pooled], dim=1))
        fused = [x]
        for scale, lateral, smooth in zip(
            reversed(larger), reversed(self.laterals), reversed(self.smooth), strict=True
        ):
            x = lateral(scale) + _resized(x, scale)
            fused.append(smooth(x))
        x = self.fuse(torch.cat([_resized(each, fused[-1]) for each in reversed(fused)], dim=1))
        logits = [self.classify(self.dropout(x))]
        if self.auxiliary is not None and self.training:
            logits.append(self.auxiliary(maps[_AUXILIARY_MAP]))
        return logits


def segmentation_loss(logits: list[Tensor], classes: Tensor, unlabelled: int, auxiliary: float) -> Tensor:
    """Mean cross-entropy of the labelled pixels, and `auxiliary` times that of the second logits.

    Args:
        logits: of one or two heads, [B, K, h, w], enlarged bilinearly to the mask.
        classes: int64 [B, H, W].
        unlabelled: value in `classes` of pixels that do not count.
        auxiliary: weight.

    Returns:
        float32 scalar; 0 where no pixel is labelled.
    """
    labelled = (classes != unlabelled).sum().clamp(min=1)
    losses = [
        F.cross_entropy(
            F.interpolate(each.float(), classes.shape[1:], mode="bilinear", align_corners=False),
            classes,
            ignore_index=unlabelled,
            reduction="sum",
        )
        / labelled
        for each in logits
    ]
    return losses[0] + auxiliary * sum(losses[1:])


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def _classifier(width: int, classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=_CLASSIFIER_STD)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
