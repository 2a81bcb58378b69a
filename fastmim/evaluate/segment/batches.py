"""Crops of images with the same crops of their masks, and the windows that cover test images.

Images go the way of all images, through DALI. Masks do not: DALI gives a palette's colours for its numbers, and its
pipeline has one file a sample. They are read beside it, by threads, and cut and flipped by the same plan.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from fastmim.config_data import DataConfig
from fastmim.data.schedule import Plan
from fastmim.evaluate.batches import decode
from fastmim.evaluate.crops import Crops, random_crops
from fastmim.evaluate.segment.masks import UNLABELLED, MaskedImages
from fastmim.ranks import cores_per_rank

_AHEAD = 3


def training_crops(
    images: MaskedImages,
    positions: np.ndarray,
    data: DataConfig,
    seed: int,
    crop: int,
    scale: tuple[float, float],
    flip: float,
) -> Crops:
    """Random crops of images whose shorter side is resized to a random multiple of the crop's.

    Args:
        images: to train on.
        positions: int64 [n], in the endless stream of images; every epoch has an order of its own.
        data: how the encoder's images are read.
        seed: of every draw.
        crop: side, pixels.
        scale: of the shorter side, lowest and highest.
        flip: probability.
    """
    index, rows = images.index, images.rows
    return random_crops(index, rows, positions, data, seed, crop, scale, flip, np.minimum)


def test_windows(images: MaskedImages, stride: float) -> Plan:
    """Square windows that cover each image: its shorter side wide, the steps between them even and at most `stride`.

    Args:
        images: to test on.
        stride: largest step, over the window's side.
    """
    rows, tops, lefts, sides = [], [], [], []
    for row in images.rows.tolist():
        height, width = int(images.index.heights[row]), int(images.index.widths[row])
        side = min(height, width)
        rest = max(height, width) - side
        places = np.rint(np.linspace(0, rest, 1 + int(np.ceil(rest / max(1, stride * side))))).astype(
            np.int64
        )
        still = np.zeros_like(places)
        tops.append(places if height > width else still)
        lefts.append(still if height > width else places)
        rows.append(np.full(len(places), row))
        sides.append(np.full(len(places), side))
    sample, top, left, side = (np.concatenate(parts) for parts in (rows, tops, lefts, sides))
    zeros = np.zeros_like(sample)
    return Plan(zeros, zeros, sample, top, left, side, side, zeros.astype(bool))


def paired_batches(
    images: MaskedImages, data: DataConfig, crops: Crops, crop: int, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Crops and those of their masks: uint8 [size, crop, crop, C], int64 [size, crop, crop].

    Args:
        images: what the crops are of.
        data: how the encoder's images are read.
        crops: all of them.
        crop: side, pixels.
        size: crops in a batch.
        device: where they are needed.

    Raises:
        DataError: an image cannot be decoded.
    """
    config = data.model_copy(update={"image_size": (crop, crop)})
    fill = torch.tensor(data.mean, device=device).mul(255).round().to(torch.uint8)
    parts = [crops.take(slice(first, first + size)) for first in range(0, len(crops.plan), size)]
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        started: deque[list[Future[np.ndarray]]] = deque()
        waiting = iter(parts)
        for part, batch in zip(parts, decode(images.index, config, crops.plan, size, device), strict=True):
            while len(started) < _AHEAD and (ahead := next(waiting, None)) is not None:
                one_by_one = range(len(ahead.plan))
                started.append(
                    [pool.submit(_mask_crop, images, ahead.take(slice(i, i + 1)), crop) for i in one_by_one]
                )
            masks = np.stack([mask.result() for mask in started.popleft()])
            yield _shrunk(batch, part, fill), torch.from_numpy(masks).to(device, non_blocking=True).long()


def _mask_crop(images: MaskedImages, one: Crops, crop: int) -> np.ndarray:
    """The mask of one crop, int16 [crop, crop], of the nearest pixels; unlabelled where nothing is."""
    plan = one.plan
    classes = images.read(images.paths[plan.sample[0]])
    rows, columns = (
        start[0] + ((np.arange(filled[0]) + 0.5) * extent[0] / filled[0]).astype(np.int64)
        for start, extent, filled in (
            (plan.top, plan.height, one.heights),
            (plan.left, plan.width, one.widths),
        )
    )
    result = np.full((crop, crop), UNLABELLED, np.int16)
    cut = classes[np.ix_(rows, columns)]
    result[: len(rows), : len(columns)] = cut[:, ::-1] if plan.flip[0] else cut
    return result


def _shrunk(batch: Tensor, crops: Crops, fill: Tensor) -> Tensor:
    """Images as large as a crop, brought to the size that they fill of it; `fill` uint8 [C] is beside them.

    DALI's outputs are of one size. Reduced from that size they lose nothing that the smaller one could show.
    """
    side = batch.shape[1]
    sizes = zip(crops.heights.tolist(), crops.widths.tolist(), strict=True)
    smaller = [(i, size) for i, size in enumerate(sizes) if size != (side, side)]
    if smaller:
        batch = batch.clone()  # DALI's own memory
    for i, (height, width) in smaller:
        image = resize(batch[i].permute(2, 0, 1), [height, width], antialias=True)
        batch[i] = fill
        batch[i, :height, :width] = image.permute(1, 2, 0)
    return batch
