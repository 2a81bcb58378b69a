"""Images of a batch with the boxes and masks of their objects, cut, resized and flipped alike.

Images go the way of all images, through DALI, by a plan; boxes and masks follow the same plan by arithmetic.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import resize

from fastmim.config_data import DataConfig
from fastmim.data.schedule import Plan
from fastmim.evaluate.batches import decode
from fastmim.evaluate.crops import Crops, filled_part, random_crops
from fastmim.evaluate.detect.annotations import Annotation, BoxedImages
from fastmim.evaluate.detect.coco import bitmap
from fastmim.ranks import cores_per_rank

_LEAST_SIDE = 1e-5

Target = dict[str, Tensor]


def jittered_crops(
    images: BoxedImages,
    positions: np.ndarray,
    data: DataConfig,
    seed: int,
    side: int,
    scale: tuple[float, float],
    flip: float,
) -> Crops:
    """Large-scale jitter: images whose longer side is a random multiple of a square's, cut where they exceed it.

    Args:
        images: to train on.
        positions: int64 [n], in the endless stream of images; every epoch has an order of its own.
        data: how the encoder's images are read.
        seed: of every draw.
        side: of the square, pixels.
        scale: of the longer side, lowest and highest.
        flip: probability.

    Source: Ghiasi et al., "Simple Copy-Paste", CVPR 2021, in ViTDet's range.
    """
    index, rows = images.index, images.rows
    return random_crops(index, rows, positions, data, seed, side, scale, flip, np.maximum)


def whole_images(images: BoxedImages, side: int) -> Crops:
    """Every image once, in order, its longer side a square's."""
    rows, zeros = images.rows, np.zeros_like(images.rows)
    size = images.index.heights[rows].astype(np.int64), images.index.widths[rows].astype(np.int64)
    plan = Plan(zeros, zeros, rows, zeros, zeros, *size, zeros.astype(bool))
    return Crops(plan, *filled_part(side, size, np.maximum(*size)))


def decoded(
    images: BoxedImages, data: DataConfig, crops: Crops, side: int, size: int, device: torch.device
) -> Iterator[list[Tensor]]:
    """The images of each batch, uint8 [C, h, w] each, as large as what they fill of the square.

    Args:
        images: what the crops are of.
        data: how the encoder's images are read.
        crops: all of them.
        side: of the square, pixels.
        size: images in a batch.
        device: where they are needed.

    Raises:
        DataError: an image cannot be decoded.
    """
    config = data.model_copy(update={"image_size": (side, side)})
    filled = iter(zip(crops.heights.tolist(), crops.widths.tolist(), strict=True))
    for batch in decode(images.index, config, crops.plan, size, device):
        # DALI's outputs are of one size. Reduced from it they lose nothing that the smaller one could show.
        yield [resize(image.permute(2, 0, 1), list(next(filled)), antialias=True) for image in batch]


def training_batches(
    images: BoxedImages, data: DataConfig, crops: Crops, side: int, size: int, device: torch.device
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """As `decoded`, each image with torchvision's targets, as of `target_of`."""
    parts = [crops.take(slice(first, first + size)) for first in range(0, len(crops.plan), size)]
    with ThreadPoolExecutor(cores_per_rank()) as pool:

        def start(part: Crops) -> list[Any]:
            return [pool.submit(target_of, images, part.take(slice(i, i + 1))) for i in range(len(part.plan))]

        started = start(parts[0])
        for number, batch in enumerate(decoded(images, data, crops, side, size, device), 1):
            ahead = start(parts[number]) if number < len(parts) else []
            targets = [target.result() for target in started]
            yield batch, [{key: value.to(device) for key, value in target.items()} for target in targets]
            started = ahead


def target_of(images: BoxedImages, one: Crops) -> Target:
    """What is to be found in one crop: boxes float32 [n, 4], labels int64 [n] from 1, and masks uint8 [n, h, w].

    With masks, boxes are those of what is left of them, as in ViTDet.
    """
    row = int(one.plan.sample[0])
    place = {kind: number for number, kind in enumerate(images.categories, 1)}
    objects = images.singles(row)
    boxes = moved_boxes(np.array([each["bbox"] for each in objects], float), one)
    kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2]).min(1) > _LEAST_SIDE)
    target = {"boxes": torch.from_numpy(boxes[kept]).float()}
    if images.masks:
        size = int(images.index.heights[row]), int(images.index.widths[row])
        masks = [_moved_mask(objects[number], size, one) for number in kept]
        seen = np.array([mask.any() for mask in masks], bool)
        kept = kept[seen]
        shape = (0, int(one.heights[0]), int(one.widths[0]))
        stacked = (
            np.stack([mask for mask, any_ in zip(masks, seen, strict=True) if any_]) if len(kept) else None
        )
        target["masks"] = (
            torch.zeros(shape, dtype=torch.uint8) if stacked is None else torch.from_numpy(stacked)
        )
        target["boxes"] = masks_to_boxes(target["masks"]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    labels = [place[objects[number]["category_id"]] for number in kept]
    return target | {"labels": torch.tensor(labels, dtype=torch.int64)}


def moved_boxes(boxes: np.ndarray, one: Crops) -> np.ndarray:
    """Boxes of an image, float64 [n, 4] x, y, width, height, where one crop of it shows them: x0, y0, x1, y1 in it."""
    plan = one.plan
    filled = np.array([one.widths[0], one.heights[0]])
    start, extent = np.array([plan.left[0], plan.top[0]]), np.array([plan.width[0], plan.height[0]])
    corners = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)  # [n, corner, x and y]
    corners = np.clip((corners - start) * filled / extent, 0, filled)
    if plan.flip[0]:
        corners[..., 0] = filled[0] - corners[:, ::-1, 0]
    return corners.reshape(-1, 4)


def _moved_mask(each: Annotation, size: tuple[int, int], one: Crops) -> np.ndarray:
    """The mask of an object as one crop shows it, uint8 [h, w], of the nearest pixels."""
    plan = one.plan
    rows, columns = (
        start[0] + ((np.arange(filled[0]) + 0.5) * extent[0] / filled[0]).astype(np.int64)
        for start, extent, filled in (
            (plan.top, plan.height, one.heights),
            (plan.left, plan.width, one.widths),
        )
    )
    cut = bitmap(each["segmentation"], size)[np.ix_(rows, columns)]
    return np.ascontiguousarray(cut[:, ::-1] if plan.flip[0] else cut)
