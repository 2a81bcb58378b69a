"""Which categories a detector takes for which, and for nothing."""

import numpy as np
import torch
from torch import Tensor

from fastmim.evaluate.detect.annotations import Annotation, BoxedImages
from fastmim.evaluate.detect.coco import Detections

NOTHING = "(nothing)"
_OVERLAP = 0.5
"""IoU from which on a box is of an object."""


def box_confusion(images: BoxedImages, found: dict[int, Detections], score: float) -> Tensor:
    """Objects by category (row) and the category of the box that was found there (column).

    In each image the boxes take, the surest first and whatever their category, the object that they overlap most,
    by an IoU of at least one half; an object is taken once. Crowds are no objects, and a box that lies in one by half
    and takes no object does not count.

    Args:
        images: to test on.
        found: in each of them, by row.
        score: of the boxes that count, at least.

    Returns:
        int64 [C + 1, C + 1], categories in their order and then nothing: the last row are boxes that took no object,
        the last column objects that no box took.
    """
    place = {kind: i for i, kind in enumerate(images.categories)}
    nothing = len(place)
    matrix = torch.zeros(nothing + 1, nothing + 1, dtype=torch.int64)
    for row in images.rows.tolist():
        things, some = images.objects[row], found[row]
        sure = some.scores >= score
        kinds = [place[kind] for kind in some.categories[sure].tolist()]
        crowd = np.array([bool(thing["iscrowd"]) for thing in things], bool)
        overlaps = _overlaps(some.boxes[sure], things)
        free = ~crowd
        for overlap, kind in zip(overlaps, kinds, strict=True):
            taken = int(np.where(free, overlap, -1).argmax()) if len(things) else -1
            if taken >= 0 and free[taken] and overlap[taken] >= _OVERLAP:
                free[taken] = False
                matrix[place[things[taken]["category_id"]], kind] += 1
            elif not (overlap[crowd] >= _OVERLAP).any():
                matrix[nothing, kind] += 1
        for missed in np.flatnonzero(free).tolist():
            matrix[place[things[missed]["category_id"]], nothing] += 1
    return matrix


def _overlaps(boxes: np.ndarray, things: list[Annotation]) -> np.ndarray:
    """IoU of boxes, x0, y0, x1, y1, with objects, [n, m]; with a crowd the share of the box that lies in it."""
    from pycocotools import mask

    if not len(boxes) or not things:
        return np.zeros((len(boxes), len(things)))
    sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    truth = np.array([thing["bbox"] for thing in things], float)
    return mask.iou(sides, truth, [thing["iscrowd"] for thing in things])
