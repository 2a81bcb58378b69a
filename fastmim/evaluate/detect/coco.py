"""COCO's measures of boxes and masks, by pycocotools."""

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmim.errors import ConfigError
from fastmim.evaluate.detect.annotations import BoxedImages

# In the order of COCOeval.stats.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_ANY_AREA, _HUNDRED, _HALF = 0, -1, 0


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image.

    Attributes:
        boxes: float64 [n, 4] x0, y0, x1, y1, pixels of the image.
        scores: float64 [n], highest first.
        categories: int64 [n], identifiers.
        masks: compressed RLEs of the image's size; None without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    categories: np.ndarray
    masks: list[Any] | None = None


def check_installed() -> None:
    """Refuse to begin without pycocotools; ConfigError says what to install."""
    if importlib.util.find_spec("pycocotools") is None:
        raise ConfigError("detect needs pycocotools, which is not installed: pip install 'fastmim[detect]'")


def bitmap(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """The pixels, uint8 [H, W], of COCO's polygons or RLE."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        return mask.decode(mask.merge(mask.frPyObjects(segmentation, *size)))
    listed = isinstance(segmentation["counts"], list)
    return mask.decode(mask.frPyObjects(segmentation, *size) if listed else segmentation)


def encode(masks: np.ndarray) -> list[Any]:
    """RLEs of masks, bool [n, H, W]."""
    from pycocotools import mask

    return [mask.encode(np.asfortranarray(each.astype(np.uint8))) for each in masks]


def measure(images: BoxedImages, found: dict[int, Detections]) -> dict[str, Any]:
    """COCO's twelve figures of boxes, and of masks where there are; and average precision by category.

    Args:
        images: to test on.
        found: in each of them, by row.

    Returns:
        `box` and `mask`: `FIGURES`, None where no object is of that size; `per_class`: objects, and box_AP and
        box_AP50, mask_AP and mask_AP50.
    """
    truth = _dataset(
        images, [_as_truth(each, row) for row in images.rows.tolist() for each in images.objects[row]]
    )
    told: dict[str, Any] = {}
    classes: dict[str, Any] = {}
    for kind, name in images.categories.items():
        objects = truth.getAnnIds(catIds=[kind], iscrowd=False)
        classes[name] = {"objects": len(objects)}
    for key in ("box", "mask") if images.masks else ("box",):
        each = [guess for row in images.rows.tolist() for guess in _as_guesses(found[row], row, key)]
        told[key], averages = _evaluate(truth, _dataset(images, each), "bbox" if key == "box" else "segm")
        for name, (ap, ap50) in zip(classes, averages, strict=True):
            classes[name] |= {f"{key}_AP": ap, f"{key}_AP50": ap50}
    return told | {"per_class": classes}


def _evaluate(truth: Any, guesses: Any, kind: Any) -> tuple[dict[str, float | None], list[tuple]]:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, guesses, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures: dict[str, float | None] = dict(zip(FIGURES, map(_known, evaluation.stats.tolist()), strict=True))
    # [thresholds, recalls, categories]
    precision = evaluation.eval["precision"][..., _ANY_AREA, _HUNDRED]
    each = [
        (_known(precision[:, :, place].mean()), _known(precision[_HALF, :, place].mean()))
        for place in range(precision.shape[2])
    ]
    return figures, each


def _dataset(images: BoxedImages, annotations: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    coco: Any = COCO()
    coco.dataset = {
        "images": [
            {"id": row, "height": int(images.index.heights[row]), "width": int(images.index.widths[row])}
            for row in images.rows.tolist()
        ],
        "categories": [{"id": key, "name": name} for key, name in images.categories.items()],
        # Numbered from 1, whatever the file has: COCOeval takes 0 for an object that was not found.
        "annotations": [{**each, "id": number} for number, each in enumerate(annotations, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _as_truth(each: dict[str, Any], row: int) -> dict[str, Any]:
    kept = ("category_id", "bbox", "area", "iscrowd", "segmentation")
    return {key: each[key] for key in kept if key in each} | {"image_id": row}


def _as_guesses(found: Detections, row: int, key: str) -> list[dict[str, Any]]:
    """What was found; an area, which ranges of sizes go by, is that of what is compared."""
    from pycocotools import mask

    guesses = []
    for place, (x0, y0, x1, y1) in enumerate(found.boxes.tolist()):
        guess: dict[str, Any] = {"image_id": row, "category_id": int(found.categories[place]), "iscrowd": 0}
        guess |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": float(found.scores[place])}
        if key == "box":
            guess["area"] = (x1 - x0) * (y1 - y0)
        else:
            assert found.masks is not None, "an image without masks"
            guess |= {"segmentation": found.masks[place], "area": float(mask.area(found.masks[place]))}
        guesses.append(guess)
    return guesses


def _known(value: float) -> float | None:
    """COCOeval's -1 is no figure."""
    return None if value == -1 else float(value)
