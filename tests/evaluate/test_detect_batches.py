"""Boxes and masks stay on their objects, whatever is cut, resized and flipped."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.config_data import DataConfig
from fastmim.data.index import build_index
from fastmim.evaluate.detect.annotations import BoxedImages
from fastmim.evaluate.detect.batches import (
    decoded,
    jittered_crops,
    moved_boxes,
    training_batches,
    whole_images,
)

DATA = DataConfig(channels=1, mean=[0.5], std=[0.25])
CPU = torch.device("cpu")
SIDE = 48
SIZES = [(60, 90), (97, 64), (64, 64), (30, 21)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Bright rectangles on black, one an image: their pixels tell where they are."""
    root, random = tmp_path_factory.mktemp("boxes"), np.random.default_rng(0)
    objects = {}
    for number, (height, width) in enumerate(SIZES):
        y, x = random.integers(2, height // 3), random.integers(2, width // 3)
        h, w = random.integers(height // 3, height // 2), random.integers(width // 3, width // 2)
        pixels = np.zeros((height, width), np.uint8)
        pixels[y : y + h, x : x + w] = 255
        Image.fromarray(pixels).save(root / f"{number}.png")
        box = [int(value) for value in (x, y, w, h)]
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        told = {"id": number, "category_id": 7, "bbox": box, "area": int(w * h), "iscrowd": 0}
        objects[number] = [told | {"segmentation": [[float(value) for value in corners]]}]
    index = build_index(str(root), DATA, progress=False)
    return lambda masks: BoxedImages(index, np.arange(4), objects, {3: "other", 7: "box"}, masks)


def bright(image):
    """The box around an image's bright pixels, or None."""
    rows, columns = ((image[0] > 127).any(axis).nonzero().ravel() for axis in (1, 0))
    if not len(rows):
        return None
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).double()


@pytest.mark.parametrize("scale", [(0.3, 0.9), (1.0, 2.5)])
@pytest.mark.parametrize("masks", [False, True])
def test_boxes_and_masks_are_where_the_object_is(images, scale, masks):
    some = images(masks)
    crops = jittered_crops(some, np.arange(24), DATA, 5, SIDE, scale, 0.5)
    assert 0 < crops.plan.flip.sum() < 24
    checked = 0
    for pixels, targets in training_batches(some, DATA, crops, SIDE, 7, CPU):
        for image, target in zip(pixels, targets, strict=True):
            assert image.dtype == torch.uint8 and max(image.shape) <= SIDE
            assert (max(image.shape[1:]) == SIDE) or scale[1] < 1
            wanted = bright(image)
            if wanted is None:
                assert (
                    len(target["boxes"]) == 0 or (target["boxes"][:, 2:] - target["boxes"][:, :2]).min() < 1
                )
                continue
            (box,) = target["boxes"].double()
            assert (box - wanted).abs().max() <= 1.01 and target["labels"].tolist() == [2]
            if masks:
                (mask,) = target["masks"]
                assert mask.shape == image.shape[1:] and mask.dtype == torch.uint8
                apart = (mask.bool() != (image[0] > 127)).sum()
                assert apart <= sum(mask.shape) and (box == bright(mask[None] * 255)).all()
            checked += 1
    assert checked > 15


def test_a_box_computed_by_hand(images):
    crops = jittered_crops(images(False), np.arange(1), DATA, 0, SIDE, (1.0, 1.0), 0.0)
    plan = crops.plan
    for name, value in {"top": 10, "left": 20, "height": 40, "width": 60}.items():
        getattr(plan, name)[:] = value
    crops.heights[:], crops.widths[:] = 20, 30
    boxes = np.array([[30, 20, 20, 10], [0, 0, 40, 20], [70, 45, 30, 30], [0, 0, 5, 5]], float)
    wanted = np.array([[5, 5, 15, 10], [0, 0, 10, 5], [25, 17.5, 30, 20]])
    told = moved_boxes(boxes, crops)
    np.testing.assert_allclose(told[:3], wanted)
    assert (told[3, 2:] - told[3, :2]).min() == 0
    plan.flip[:] = True
    np.testing.assert_allclose(
        moved_boxes(boxes, crops)[:3], [[15, 5, 25, 10], [20, 0, 30, 5], [0, 17.5, 5, 20]]
    )


def test_the_jitter_covers_its_range_and_depends_on_the_position_alone(images):
    some = images(False)
    crops = jittered_crops(some, np.arange(400), DATA, 1, SIDE, (0.1, 2.0), 0.5)
    sizes = np.array(SIZES)[crops.plan.sample]
    # How large the whole image would be shown, of its longer side.
    shown = sizes.max(1) * crops.widths / crops.plan.width / SIDE
    assert 0.05 < shown.min() < 0.2 and 1.85 < shown.max() < 2.1 and 0.9 < shown.mean() < 1.2
    assert 0.4 < crops.plan.flip.mean() < 0.6
    assert np.bincount(crops.plan.sample).tolist() == [100] * 4
    part = jittered_crops(some, np.arange(100, 110), DATA, 1, SIDE, (0.1, 2.0), 0.5)
    for name, value in vars(part.plan).items():
        if value is not None:
            np.testing.assert_array_equal(value, getattr(crops.plan, name)[100:110])
    assert (
        jittered_crops(some, np.arange(400), DATA, 2, SIDE, (0.1, 2.0), 0.5).plan.top != crops.plan.top
    ).any()


def test_whole_images_keep_their_shape(images):
    (batch,) = decoded(images(False), DATA, whole_images(images(False), SIDE), SIDE, 4, CPU)
    assert [tuple(image.shape) for image in batch] == [(1, 32, 48), (1, 48, 32), (1, 48, 48), (1, 48, 34)]
    x, y, w, h = images(False).objects[0][0]["bbox"]
    wanted = torch.tensor([x, y, x + w, y + h]) * 48 / 90
    assert (bright(batch[0]) - wanted).abs().max() <= 1
