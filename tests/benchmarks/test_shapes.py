"""The drawn set: its masks and annotations tell of the same pixels, and it is drawn again alike."""

import json

import numpy as np
from PIL import Image

from benchmarks.shapes import draw_shapes
from fastmim.evaluate.detect.coco import bitmap


def test_masks_and_annotations_agree_and_are_drawn_again_alike(tmp_path):
    for name in ("a", "b"):
        draw_shapes(tmp_path / name, 6, 64, 3)
    files = [
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*")) for name in "ab"
    ]
    assert files[0] == files[1] and len(files[0]) == 13
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files[0]
    )
    told = json.loads((tmp_path / "a" / "instances.json").read_text())
    for image in told["images"]:
        with Image.open(tmp_path / "a" / "masks" / image["file_name"]) as file:
            left = np.array(file)
        for each in told["annotations"]:
            if each["image_id"] != image["id"]:
                continue
            x, y, width, height = each["bbox"]
            inside = bitmap(each["segmentation"], left.shape).astype(bool)
            drawn = inside & (left == each["category_id"])
            assert drawn.sum() > 0.9 * max(inside.sum(), each["area"])
            rows, columns = (np.flatnonzero(drawn.any(axis)) for axis in (1, 0))
            assert abs(np.array([columns[0] - x, rows[0] - y]).max()) <= 1
            assert abs(columns[-1] + 1 - x - width) <= 1 and abs(rows[-1] + 1 - y - height) <= 1
            left[bitmap(each["segmentation"], left.shape).astype(bool)] = 0
        assert (left > 0).mean() < 0.02
