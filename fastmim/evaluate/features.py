"""Features of images by a frozen encoder."""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastmim.config import Config
from fastmim.data.schedule import Plan
from fastmim.evaluate.batches import centre_plan, decode, random_plan
from fastmim.evaluate.config import ProtocolConfig, ViewsConfig
from fastmim.evaluate.job import Job
from fastmim.evaluate.labels import LabelledImages
from fastmim.evaluate.resume import keep_rows
from fastmim.evaluate.shards import gather_batches, own_batches
from fastmim.masking import Mask, mask_from_order
from fastmim.models import Encoder
from fastmim.precision import choose_precision
from fastmim.ranks import Ranks


class FeatureExtractor:
    """Runs a frozen encoder over whole images, one feature each; all ranks share the work, and each has all features.

    Args:
        encoder: in evaluation mode; it stays as it is.
        config: that the encoder was trained with; what its images are.
        protocol: pool, center, images_at_once, precision and seed are read.
        job: the evaluation that asks, whose ranks share the work and whose folder keeps it; this process alone, and
            nothing is kept, unless given.

    Attributes:
        width: of a feature.
        device: where the features are.
    """

    def __init__(self, encoder: Encoder, config: Config, protocol: ProtocolConfig, job: Job | None = None):
        self.protocol, self._data, self._job = protocol, config.data, job
        self._ranks = Ranks() if job is None else job.ranks
        bf16 = choose_precision(protocol.precision, encoder.cls_token.device) == "bf16"
        self._encoder = _in_bf16(encoder) if bf16 else encoder
        self.device, self._grid = encoder.cls_token.device, config.grid
        self.width = config.model.width * (4 if protocol.pool == "quadrants" else 1)

    @classmethod
    def of(cls, job: Job) -> "FeatureExtractor":
        """The features that a protocol's images have."""
        return cls(job.encoder, job.trained, job.config, job)

    def centre(self, images: LabelledImages, name: str | None = None) -> Tensor:
        """Features of centre crops, float32 [n, width], in the order of the images.

        Args:
            images: what to look at.
            name: of these images in the job, which keeps their features under it until its result is there: stopped,
                it goes on with the next image. Without one nothing is kept.
        """
        if self._job is None or name is None:
            return torch.cat(list(self.centre_parts(images)))
        parts = keep_rows(self._job, name, lambda first: self.centre_parts(images, first))
        return torch.cat([part.to(self.device) for part in parts])

    def centre_parts(self, images: LabelledImages, first: int = 0) -> Iterator[Tensor]:
        """As `centre`, [b, width] at a time from image `first`; [b, patches, width] where nothing is pooled."""
        plan = centre_plan(images.index, images.rows, self._data, self.protocol.center)
        return self._features(images, plan.take(slice(first, None)))

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
        shape = (
            (self._grid[0] * self._grid[1], self.width) if self.protocol.pool == "patches" else (self.width,)
        )
        none = torch.empty(0, *shape, device=self.device)
        own = self._own_features(images, own_batches(plan, size, self._ranks))
        return gather_batches(own, len(plan), size, none, self._ranks)

    @torch.no_grad()
    def _own_features(self, images: LabelledImages, plan: Plan) -> Iterator[Tensor]:
        size = self.protocol.images_at_once
        batches = decode(images.index, self._data, plan, size, self.device)
        quiet = None if self._ranks.first else True
        patches = self._grid[0] * self._grid[1]
        for batch in tqdm(batches, total=-(-len(plan) // size), desc="features", leave=False, disable=quiet):
            tokens = self._encoder(batch, everything(len(batch), patches, self.device)).float()
            yield pooled(tokens, self.protocol.pool, self._grid)


def _in_bf16(encoder: Encoder) -> Encoder:
    copied = copy.deepcopy(encoder)
    for parameter in copied.parameters():
        parameter.data = parameter.data.bfloat16()
    return copied


def pooled(tokens: Tensor, pool: str, grid: tuple[int, int]) -> Tensor:
    """What stands for an image.

    Args:
        tokens: [B, 1 + rows x columns, D], the cls token first.
        pool: cls, mean, quadrants or patches. Quarters of a grid with an odd side share the patches in its middle.
        grid: rows and columns of patches.

    Returns:
        [B, D]; of quadrants [B, 4 D]: upper left, upper right, lower left, lower right; of patches
        [B, rows x columns, D].
    """
    if pool == "cls":
        return tokens[:, 0]
    patches = tokens[:, 1:]
    if pool == "mean":
        return patches.mean(1)
    if pool == "patches":
        return patches
    maps = patches.unflatten(1, grid).movedim(-1, 1)
    return F.adaptive_avg_pool2d(maps, 2).flatten(2).transpose(1, 2).flatten(1)


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
