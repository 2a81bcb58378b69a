"""An encoder with a segmentation head, and its predictions of whole test images."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.config_data import DataConfig
from fastmim.evaluate.batches import decode
from fastmim.evaluate.dense import DenseEncoder
from fastmim.evaluate.segment.batches import test_windows
from fastmim.evaluate.segment.config import SegmentConfig
from fastmim.evaluate.segment.heads import LinearHead, UPerNet
from fastmim.evaluate.segment.masks import MaskedImages


class Segmenter(nn.Module):
    """Maps of an encoder, and a head on them.

    Args:
        encoder: four maps for UPerNet, one for a linear head.
        head: `UPerNet` or `LinearHead`.
        precision: bf16, by autocast, or fp32.
    """

    def __init__(self, encoder: DenseEncoder, head: nn.Module, precision: str = "fp32"):
        super().__init__()
        self.encoder, self.head, self.precision = encoder, head, precision

    def forward(self, images: Tensor) -> list[Tensor]:
        """images uint8 [B, H, W, C] -> logits [B, K, h, w] of each head that the head has."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.head(self.encoder(images))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """The layers of learning rates, for timm: the embedding, each block, and the rest."""
        return {
            "stem": r"encoder\.encoder\.(?:patch_embed|cls_token|pos_embed)",
            "blocks": r"encoder\.encoder\.blocks\.layers\.(\d+)",
        }


def build_head(config: SegmentConfig, encoder_width: int, classes: int) -> nn.Module:
    """The head that a configuration asks for, its weights drawn from its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.head == "linear":
            return LinearHead(encoder_width, classes)
        assert config.width is not None, "a configuration that is not resolved"
        return UPerNet(encoder_width, config.width, classes, config.dropout, config.auxiliary > 0)


@torch.no_grad()
def predict(
    model: Segmenter, images: MaskedImages, data: DataConfig, config: SegmentConfig, device: torch.device
) -> Iterator[Tensor]:
    """The likeliest class of every pixel of each image, int64 [H, W], in the order of the images.

    Windows as large as an image's shorter side slide over it; where they overlap, their logits are averaged.

    Args:
        model: in evaluation mode.
        images: to test on.
        data: how the encoder's images are read.
        config: crop, stride and batch_size are read.
        device: where the model is.
    """
    plan = test_windows(images, config.stride)
    data = data.model_copy(update={"image_size": (config.crop, config.crop)})
    batches = decode(images.index, data, plan, config.batch_size, device)
    windows = (window for batch in batches for window in model(batch)[0])
    ends = np.append(np.flatnonzero(np.diff(plan.sample)), len(plan) - 1) + 1
    first = 0
    for end in ends.tolist():
        row = int(plan.sample[first])
        size = int(images.index.heights[row]), int(images.index.widths[row])
        yield _joined(windows, plan.top[first:end], plan.left[first:end], int(plan.height[first]), size)
        first = end


def _joined(
    windows: Iterator[Tensor], tops: np.ndarray, lefts: np.ndarray, side: int, size: tuple[int, int]
) -> Tensor:
    total: Tensor | None = None
    count: Tensor | None = None
    for top, left in zip(tops.tolist(), lefts.tolist(), strict=True):
        logits = next(windows)
        if total is None or count is None:
            total, count = logits.new_zeros(len(logits), *size), logits.new_zeros(size)
        place = slice(top, top + side), slice(left, left + side)
        total[:, *place] += F.interpolate(
            logits[None].float(), (side, side), mode="bilinear", align_corners=False
        )[0]
        count[place] += 1
    assert total is not None and count is not None, "an image without a window"
    return (total / count).argmax(0)
