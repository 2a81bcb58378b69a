"""Features of images by a frozen encoder."""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from fastmim.config import Config
from fastmim.data.schedule import Plan
from fastmim.evaluate.batches import centre_plan, decode, random_plan
from fastmim.evaluate.config import ProtocolConfig, ViewsConfig
from fastmim.evaluate.job import Job
from fastmim.evaluate.labels import LabelledImages
from fastmim.evaluate.shards import gather_batches, own_batches
from fastmim.masking import Mask, mask_from_order
from fastmim.models import Encoder
from fastmim.ranks import Ranks


class FeatureExtractor:
    """Runs a frozen encoder over whole images, one feature each; all ranks share the work, and each has all features.

    Args:
        encoder: in evaluation mode.
        config: that the encoder was trained with; what its images are.
        protocol: pool, center, images_at_once and seed are read.
        ranks: this process among all; alone unless given.

    Attributes:
        width: of a feature.
        device: where the features are.
    """

    def __init__(
        self, encoder: Encoder, config: Config, protocol: ProtocolConfig, ranks: Ranks | None = None
    ):
        self.encoder, self.protocol, self._data = encoder, protocol, config.data
        self._ranks = ranks or Ranks()
        self.device, self.width = encoder.cls_token.device, config.model.width
        self._patches = config.grid[0] * config.grid[1]

    @classmethod
    def of(cls, job: Job) -> "FeatureExtractor":
        """The features that a protocol's images have."""
        return cls(job.encoder, job.trained, job.config, job.ranks)

    def centre(self, images: LabelledImages) -> Tensor:
        """Features of centre crops, float32 [n, width], in the order of the images."""
        return torch.cat(list(self.centre_parts(images)))

    def centre_parts(self, images: LabelledImages) -> Iterator[Tensor]:
        """As `centre`, [b, width] at a time; [b, patches, width] where the protocol pools nothing."""
        plan = centre_plan(images.index, images.rows, self._data, self.protocol.center)
        return self._features(images, plan)

    def epoch(
        self, images: LabelledImages, epoch: int, views: ViewsConfig
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features of random crops in random order, as `centre_parts` yields them, and their labels, int64 [b]."""
        data = self._data.model_copy(update={"scale": views.scale, "flip": views.flip})
        plan = random_plan(images.index, images.rows, data, views.seed, epoch)
        labels = torch.from_numpy(images.labels_of(plan.sample)).to(self.device)
        size = self.protocol.images_at_once
        yield from zip(self._features(images, plan), labels.split(size), strict=True)

    def _features(self, images: LabelledImages, plan: Plan) -> Iterator[Tensor]:
        size = self.protocol.images_at_once
        shape = (self._patches, self.width) if self.protocol.pool == "patches" else (self.width,)
        none = torch.empty(0, *shape, device=self.device)
        own = self._own_features(images, own_batches(plan, size, self._ranks))
        return gather_batches(own, len(plan), size, none, self._ranks)

    @torch.no_grad()
    def _own_features(self, images: LabelledImages, plan: Plan) -> Iterator[Tensor]:
        size = self.protocol.images_at_once
        batches = decode(images.index, self._data, plan, size, self.device)
        quiet = None if self._ranks.first else True
        for batch in tqdm(batches, total=-(-len(plan) // size), desc="features", leave=False, disable=quiet):
            tokens = self.encoder(batch, everything(len(batch), self._patches, self.device)).float()
            yield _pooled(tokens, self.protocol.pool)


def _pooled(tokens: Tensor, pool: str) -> Tensor:
    if pool == "cls":
        return tokens[:, 0]
    return tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 1:]


def everything(images: int, patches: int, device: torch.device) -> Mask:
    """The mask that removes no patch."""
    return mask_from_order(torch.arange(patches, device=device).expand(images, -1), patches)


def regroup(parts: Iterator[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of exactly `size` from smaller or larger ones; the images that are left at the end are dropped."""
    features, labels, held = [], [], 0
    for some, their in parts:
        features.append(some)
        labels.append(their)
        held += len(some)
        if held < size:
            continue
        whole, kinds = torch.cat(features), torch.cat(labels)
        for first in range(0, held - size + 1, size):
            yield whole[first : first + size], kinds[first : first + size]
        held %= size
        features, labels = [whole[len(whole) - held :]], [kinds[len(kinds) - held :]]
