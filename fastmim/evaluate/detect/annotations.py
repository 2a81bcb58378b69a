"""COCO's annotations: what a file must hold, and which of a folder's images it tells of."""

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmim.config_data import DataConfig
from fastmim.data.index import Index, build_index
from fastmim.errors import DataError
from fastmim.evaluate.split import split_places

Annotation = dict[str, Any]
_NUMBER = int | float
_PARTS: dict[str, dict[str, Any]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {
        "id": int,
        "image_id": int,
        "category_id": int,
        "bbox": list,
        "area": _NUMBER,
        "iscrowd": int,
    },
    "categories": {"id": int, "name": str},
}
# Annotation tools round: a box may end this far outside, in pixels.
_ROUNDING = 1.0


@dataclass(frozen=True, eq=False)
class BoxedImages:
    """Some images of an index, and the objects in each.

    Attributes:
        index: where the images are.
        rows: int64 [n], which of its images.
        objects: annotations as the file has them, by row.
        categories: names by identifier, ascending.
        masks: whether every object has a checked segmentation.
    """

    index: Index
    rows: np.ndarray
    objects: dict[int, list[Annotation]]
    categories: dict[int, str]
    masks: bool

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray | slice) -> "BoxedImages":
        """The images at some places."""
        return replace(self, rows=self.rows[places])

    def singles(self, row: int) -> list[Annotation]:
        """The objects of an image that are no crowds."""
        return [each for each in self.objects[row] if not each["iscrowd"]]

    def described(self) -> dict[str, Any]:
        """What eval.json tells of them."""
        objects = sum(len(self.objects[row]) for row in self.rows.tolist())
        return {
            "images": len(self),
            "objects": objects,
            "classes": len(self.categories),
            "sha256": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """SHA-256 of the index's fingerprint, the rows, the categories, and what is read of each object."""
        keys = ["category_id", "bbox", "area", "iscrowd"] + ["segmentation"] * self.masks
        digest = hashlib.sha256(f"{self.index.fingerprint}\0{json.dumps(self.categories)}".encode())
        digest.update(np.ascontiguousarray(self.rows, "<i8").data)
        for row in self.rows.tolist():
            told = [[each[key] for key in keys] for each in self.objects[row]]
            digest.update(json.dumps(told, sort_keys=True).encode())
        return digest.hexdigest()

    def with_objects(self) -> "BoxedImages":
        """Those of the images that have an object to learn from.

        Raises:
            DataError: none has.
        """
        having = np.array([bool(self.singles(row)) for row in self.rows.tolist()], bool)
        if not having.any():
            raise DataError(
                f"none of the {len(self)} annotated images of --data has an object that is no crowd"
            )
        return self.take(having)

    def hold_out(self, share: float, seed: int) -> tuple["BoxedImages", "BoxedImages"]:
        """What stays, and a random share that is held out, rounded, at least one image.

        Raises:
            DataError: none would stay.
        """
        kept, held = split_places(len(self), share, seed)
        return self.take(kept), self.take(held)


def read_boxed(
    source: str, annotations: str, config: DataConfig, option: str, masks: bool, drop_empty: bool
) -> BoxedImages:
    """The images of a folder that a file of annotations tells of.

    Args:
        source: folder of images.
        annotations: COCO's JSON of objects; `file_name` is below the folder.
        config: how the images are read.
        option: what `source` was given as, for messages.
        masks: every object needs a segmentation.
        drop_empty: boxes without an area are left out.

    Raises:
        DataError: no such images, or a file whose parts do not fit together; names the first that does not.
    """
    told = _read(annotations)
    index = build_index(source, config, progress=False, option=option)
    if index.kind != "folder":
        raise DataError(
            f"{option} {source} is a {index.kind} source; expected a folder, for annotations by file name"
        )
    rows = _rows_of_images(told["images"], index, annotations)
    categories = {each["id"]: each["name"] for each in told["categories"]}
    names = set(categories.values())
    if not names or min(len(names), len(categories)) < len(told["categories"]):
        raise DataError(
            f"{annotations} has {len(told['categories'])} categories of {len(categories)} identifiers and "
            f"{len(names)} names; expected one or more, all different"
        )
    objects: dict[int, list[Annotation]] = {row: [] for row in rows.values()}
    for each in told["annotations"]:
        what = f"{annotations}: annotation {each['id']}"
        if each["image_id"] not in rows:
            raise DataError(f"{what} is of image_id={each['image_id']!r}, which `images` does not have")
        if each["category_id"] not in categories:
            raise DataError(
                f"{what} is of category_id={each['category_id']!r}, which `categories` does not have"
            )
        row = rows[each["image_id"]]
        size = int(index.heights[row]), int(index.widths[row])
        if _is_empty(each["bbox"], size, what, index.name(row)):
            if drop_empty:
                continue
            raise DataError(
                f"{what} has the box {each['bbox']} without an area; expected one, or drop_empty_boxes=true"
            )
        if masks:
            _check_segmentation(each, size, what)
        objects[row].append(each)
    ordered = {key: categories[key] for key in sorted(categories)}
    return BoxedImages(index, np.array(sorted(objects), np.int64), objects, ordered, masks)


def check_same_categories(train: BoxedImages, test: BoxedImages) -> None:
    """Refuse a test set with other categories; DataError names the first that differs."""
    for key in sorted(train.categories.keys() | test.categories.keys()):
        ours, theirs = train.categories.get(key), test.categories.get(key)
        if ours != theirs:
            raise DataError(f"category {key} is {ours!r} in annotations and {theirs!r} in test_annotations")


def _read(path: str) -> dict[str, Any]:
    """The file's mapping, whose entries have the keys that they need."""
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error})") from error
    for part, keys in _PARTS.items():
        entries = told.get(part) if isinstance(told, dict) else None
        if not isinstance(entries, list):
            raise DataError(
                f"{path} has no list `{part}`; expected COCO's images, annotations and categories"
            )
        for place, entry in enumerate(entries):
            for key, kind in keys.items():
                if not isinstance(entry, dict) or key not in entry:
                    raise DataError(f"{path}: {part}[{place}] has no `{key}`; expected {', '.join(keys)}")
                if not isinstance(entry[key], kind):
                    expected = getattr(kind, "__name__", str(kind))
                    raise DataError(f"{path}: {part}[{place}] has {key}={entry[key]!r}; expected {expected}")
    return told


def _rows_of_images(entries: list[dict[str, Any]], index: Index, path: str) -> dict[Any, int]:
    """Rows of the index by identifier."""
    row_of = {os.fsdecode(name): row for row, name in enumerate(index.names)}
    rejected = dict(index.rejected)
    rows: dict[Any, int] = {}
    for entry in entries:
        name, row = entry["file_name"], row_of.get(entry["file_name"])
        if row is None:
            reason = rejected.get(name)
            told = f"cannot be used ({reason})" if reason else f"is not in {index.root}"
            raise DataError(f"{path} names {name}, which {told}")
        size = int(index.heights[row]), int(index.widths[row])
        if size != (entry["height"], entry["width"]):
            raise DataError(
                f"{path}: {name} is {entry['height']}x{entry['width']} pixels; its file is {size[0]}x{size[1]}"
            )
        if entry["id"] in rows:
            raise DataError(f"{path} has two images of id={entry['id']!r}; {name} is the second")
        rows[entry["id"]] = row
    if len(set(rows.values())) < len(rows):
        raise DataError(f"{path} names {len(rows)} images, but {len(set(rows.values()))} files")
    if not rows:
        raise DataError(f"{path} names no image")
    return rows


def _is_empty(box: list, size: tuple[int, int], what: str, image: str) -> bool:
    """Whether a box has no area; DataError where it is none, or outside its image."""
    numbers = len(box) == 4 and all(isinstance(value, _NUMBER) for value in box)
    if not numbers or not all(map(math.isfinite, box)):
        raise DataError(f"{what} has bbox={box!r}; expected four numbers [x, y, width, height]")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return True
    inside = (
        min(x, y) >= -_ROUNDING and x + width <= size[1] + _ROUNDING and y + height <= size[0] + _ROUNDING
    )
    if not inside:
        raise DataError(f"{what} has the box {box}, outside {image} of {size[0]}x{size[1]} pixels")
    return False


def _check_segmentation(each: Annotation, size: tuple[int, int], what: str) -> None:
    shape = each.get("segmentation")
    if isinstance(shape, dict):
        if shape.get("size") != list(size) or not isinstance(shape.get("counts"), list | str):
            raise DataError(
                f"{what} has an RLE of size={shape.get('size')}; expected `counts` and {list(size)}"
            )
    elif not shape or not all(
        isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in shape
    ):
        raise DataError(f"{what} has no polygon or RLE in `segmentation`; expected one, or head=faster_rcnn")
