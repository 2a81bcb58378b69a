"""Features of images by a frozen encoder."""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from fastmim.config import Config
from fastmim.data.schedule import Plan
from fastmim.evaluate.batches import centre_plan, decode, random_plan
from fastmim.evaluate.config import LinearConfig, ProtocolConfig
from fastmim.evaluate.labels import LabelledImages
from fastmim.masking import Mask, mask_from_order
from fastmim.models import Encoder


class FeatureExtractor:
    """Runs a frozen encoder over whole images, one feature each.

    Args:
        encoder: in evaluation mode.
        config: that the encoder was trained with; what its images are.
        protocol: pool, center, images_at_once and seed are read.

    Attributes:
        width: of a feature.
        device: where the features are.
    """

    def __init__(self, encoder: Encoder, config: Config, protocol: ProtocolConfig):
        self.encoder, self.protocol, self._data = encoder, protocol, config.data
        self.device, self.width = encoder.cls_token.device, config.model.width
        self._patches = config.grid[0] * config.grid[1]

    def centre(self, images: LabelledImages) -> Tensor:
        """Features of centre crops, float32 [n, width], in the order of the images."""
        plan = centre_plan(images.index, images.rows, self._data, self.protocol.center)
        return torch.cat(list(self._features(images, plan)))

    def epoch(
        self, images: LabelledImages, epoch: int, linear: LinearConfig
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features of random crops in random order, float32 [b, width], and their labels, int64 [b]."""
        data = self._data.model_copy(update={"scale": linear.scale, "flip": linear.flip})
        plan = random_plan(images.index, images.rows, data, linear.seed, epoch)
        class_of = torch.full((len(images.index),), -1)
        class_of[torch.from_numpy(images.rows)] = torch.from_numpy(images.labels)
        labels = class_of[torch.from_numpy(plan.sample)].to(self.device)
        size = self.protocol.images_at_once
        yield from zip(self._features(images, plan), labels.split(size), strict=True)

    @torch.no_grad()
    def _features(self, images: LabelledImages, plan: Plan) -> Iterator[Tensor]:
        size = self.protocol.images_at_once
        batches = decode(images.index, self._data, plan, size, self.device)
        for batch in tqdm(batches, total=-(-len(plan) // size), desc="features", leave=False, disable=None):
            tokens = self.encoder(batch, self._everything(len(batch))).float()
            yield tokens[:, 0] if self.protocol.pool == "cls" else tokens[:, 1:].mean(1)

    def _everything(self, images: int) -> Mask:
        order = torch.arange(self._patches, device=self.device).expand(images, -1)
        return mask_from_order(order, self._patches)
