"""A drawn data set with masks and boxes: discs, squares and triangles on real photographs.

A shape's brightness and texture tell nothing of its kind: only its outline does.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmim.data.demo import _image_folder

KINDS = ("disc", "square", "triangle")
CORNERS = {"square": 4, "triangle": 3}
_MOST = 3
_RADIUS = (0.12, 0.24)
_CONTRAST = 45
_TRIES = 50


def draw_shapes(folder: Path, images: int, size: int, seed: int) -> None:
    """Draw a set; equal arguments draw equal bytes.

    Args:
        folder: gets images/*.png (grey, uint8), masks/*.png of the same names (uint8: 0 background, 1 disc, 2 square,
            3 triangle) and instances.json in COCO's format: boxes are tight around a mask's pixels, squares and
            triangles are polygons, discs uncompressed RLE.
        images: how many; each has one to three shapes, which do not overlap.
        size: of an image's sides, pixels.
        seed: of every draw; equal pictures need equal seeds and numbers, not an equal count.
    """
    photographs = sorted(_image_folder().glob("*.png"))
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(images):
        random = np.random.default_rng([seed, number])
        canvas, classes = _background(random, photographs, size), np.zeros((size, size), np.uint8)
        for _ in range(random.integers(1, _MOST + 1)):
            kind = int(random.integers(1, len(KINDS) + 1))
            inside, corners = _place(random, CORNERS.get(KINDS[kind - 1]), classes)
            if inside is None:
                continue
            canvas[inside] = _filling(random, photographs, size, canvas[inside].mean())[inside]
            classes[inside] = kind
            told = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": kind, "iscrowd": 0}
            annotations.append(told | _outline(inside, corners))
        name = f"{number:04d}.png"
        pictures.append({"id": number + 1, "file_name": name, "height": size, "width": size})
        Image.fromarray(canvas).save(folder / "images" / name)
        Image.fromarray(classes).save(folder / "masks" / name)
    categories = [{"id": kind, "name": name} for kind, name in enumerate(KINDS, 1)]
    instances = {"images": pictures, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances))


def _background(random: np.random.Generator, photographs: list[Path], size: int) -> np.ndarray:
    """A random square window of a random photograph, uint8 [size, size]."""
    with Image.open(photographs[random.integers(len(photographs))]) as image:
        side = int(min(image.size) * random.uniform(0.6, 1))
        left, top = (int(random.integers(extent - side + 1)) for extent in image.size)
        window = (left, top, left + side, top + side)
        return np.array(image.convert("L").resize((size, size), Image.Resampling.BICUBIC, box=window))


def _place(
    random: np.random.Generator, corners: int | None, classes: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The pixels of a shape, bool [size, size], and its corners [n, 2] (x, y), none of a disc; where there is room."""
    size = len(classes)
    rows, columns = np.mgrid[:size, :size] + 0.5
    for _ in range(_TRIES):
        radius = size * random.uniform(*_RADIUS)
        x, y = random.uniform(radius, size - radius, 2)
        angles = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners or 0) / (corners or 1)
        points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
        inside = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            inside &= (x1 - x0) * (rows - y0) - (y1 - y0) * (columns - x0) >= 0
        if not classes[inside].any():
            return inside, points if corners else None
    return None, None


def _filling(random: np.random.Generator, photographs: list[Path], size: int, behind: float) -> np.ndarray:
    """A texture that is brighter or darker than what is behind it, uint8 [size, size]."""
    away = _CONTRAST + random.uniform(0, 40)
    levels = [level for level in (behind - away, behind + away) if 20 < level < 235] or [behind - away]
    level = levels[random.integers(len(levels))]
    kind = random.integers(4)
    rows, columns = np.mgrid[:size, :size]
    if kind == 0:
        texture = np.zeros((size, size))
    elif kind == 1:
        texture = random.normal(0, 14, (size, size))
    elif kind == 2:
        angle = random.uniform(0, np.pi)
        across = rows * np.cos(angle) + columns * np.sin(angle)
        texture = 16 * np.sin(2 * np.pi * across / (size * random.uniform(0.04, 0.12)))
    else:
        photograph = _background(random, photographs, size).astype(float)
        texture = 0.5 * (photograph - photograph.mean())
    return np.clip(level + texture, 0, 255).astype(np.uint8)


def _outline(inside: np.ndarray, corners: np.ndarray | None) -> dict[str, Any]:
    """Box, area and segmentation of some pixels, as COCO tells them."""
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    if corners is None:
        # Lengths of runs down the columns, the first of pixels outside.
        down = inside.T.ravel()
        changes = np.flatnonzero(np.diff(down)) + 1
        counts = np.diff(np.concatenate([[0], changes, [down.size]])).tolist()
        outline = {"size": list(inside.shape), "counts": [0, *counts] if down[0] else counts}
    else:
        outline = [[round(float(value), 2) for value in corners.ravel()]]
    return {"bbox": [int(value) for value in box], "area": int(inside.sum()), "segmentation": outline}
