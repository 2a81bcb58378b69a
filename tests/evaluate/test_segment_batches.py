"""Crops of images and masks stay on each other, and windows cover an image."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.config_data import DataConfig
from fastmim.evaluate.segment import batches
from fastmim.evaluate.segment.batches import paired_batches, training_crops
from fastmim.evaluate.segment.masks import UNLABELLED, MaskReader, read_masked

LEVELS = np.array([20, 90, 160, 230], np.uint8)
DATA = DataConfig(channels=1, mean=[0.5], std=[0.25])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images whose pixels tell their class, in large areas: a wrong crop of a mask shows."""
    root, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir()
    for number, size in enumerate([(60, 90), (97, 64), (64, 64), (120, 80), (50, 51)]):
        areas = random.integers(0, 4, (2, 2), dtype=np.uint8)
        classes = np.array(Image.fromarray(areas).resize(size[::-1], Image.Resampling.NEAREST))
        Image.fromarray(LEVELS[classes]).save(root / "images" / f"{number}.png")
        Image.fromarray(classes).save(root / "masks" / f"{number}.png")
    reader = MaskReader(255, False)
    return read_masked(
        str(root / "images"), str(root / "masks"), DATA, reader, "--data", ("a", "b", "c", "d")
    )


def batch_of(images, positions, scale=(0.5, 2.0), seed=3, size=7, crop=32):
    crops = training_crops(images, positions, DATA, seed, crop, scale, 0.5)
    parts = list(paired_batches(images, DATA, crops, crop, size, CPU))
    return crops, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


@pytest.mark.parametrize("scale", [(1.0, 2.0), (0.5, 0.9)])
def test_a_mask_is_cut_as_its_image_is(images, scale):
    _, pixels, classes = batch_of(images, np.arange(25), scale)
    assert pixels.shape == (25, 32, 32, 1) and pixels.dtype == torch.uint8
    assert classes.shape == (25, 32, 32) and classes.dtype == torch.int64
    levels = torch.from_numpy(LEVELS.astype(np.int64))
    labelled = classes != UNLABELLED
    far = (pixels[..., 0].long() - levels[classes.clamp(min=0)]).abs() > 35
    # Between two areas an image is interpolated, and there alone: the lines of at most two borders.
    assert (far & labelled).sum((1, 2)).max() <= 4 * 32
    assert (far & labelled).float().mean() < 0.02
    filled = pixels[..., 0][~labelled]
    assert (filled == 128).all() and bool(len(filled)) == (scale[0] < 1)


def test_flips_and_scales_are_as_often_as_they_should(images):
    crops, *_ = batch_of(images, np.arange(300), seed=1, size=300)
    assert 0.4 < crops.plan.flip.mean() < 0.6
    index = images.index
    shorter = np.minimum(index.heights, index.widths)[crops.plan.sample]
    inside = (crops.heights == 32) & (crops.widths == 32)
    scale = shorter[inside] / crops.plan.height[inside]
    assert scale.max() < 2.1 and (scale > 1.5).mean() > 0.25 and len(scale) > 180
    # What does not fill the crop is a whole side of its image.
    low = crops.heights < 32
    assert low.any() and (crops.plan.height[low] == index.heights[crops.plan.sample[low]]).all()
    aspect = (crops.plan.height / crops.heights) / (crops.plan.width / crops.widths)
    assert np.abs(aspect - 1).max() < 0.06
    ends = crops.plan.top + crops.plan.height, crops.plan.left + crops.plan.width
    assert (ends[0] <= index.heights[crops.plan.sample]).all() and (
        ends[1] <= index.widths[crops.plan.sample]
    ).all()


def test_a_crop_depends_on_its_position_alone(images):
    _, pixels, classes = batch_of(images, np.arange(20))
    _, later, theirs = batch_of(images, np.arange(9, 20), size=4)
    assert torch.equal(pixels[9:], later) and torch.equal(classes[9:], theirs)
    _, other, _ = batch_of(images, np.arange(20), seed=4)
    assert not torch.equal(pixels, other)
    crops, *_ = batch_of(images, np.arange(5))
    assert sorted(crops.plan.sample) == list(range(5))  # an epoch has each image once


def test_images_that_are_held_out_are_not_trained_on(images):
    some = images.take(np.array([1, 4]))
    crops, *_ = batch_of(some, np.arange(10))
    assert set(crops.plan.sample.tolist()) == {1, 4}


@pytest.mark.parametrize("stride", [2 / 3, 1.0, 0.25])
def test_windows_cover_an_image_evenly(images, stride):
    plan = batches.test_windows(images, stride)
    for row in range(len(images)):
        height, width = int(images.index.heights[row]), int(images.index.widths[row])
        side = min(height, width)
        seen = np.zeros((height, width), int)
        mine = plan.take(plan.sample == row)
        assert (mine.height == side).all() and (mine.width == side).all() and not mine.flip.any()
        for top, left in zip(mine.top, mine.left, strict=True):
            assert 0 <= top <= height - side and 0 <= left <= width - side
            seen[top : top + side, left : left + side] += 1
        assert seen.min() == 1 or len(mine) > 2
        assert seen.min() >= 1
        steps = np.diff(np.maximum(mine.top, mine.left))
        assert not len(steps) or (steps.max() <= np.ceil(stride * side) and steps.max() - steps.min() <= 1)
        assert len(mine) == 1 + np.ceil((max(height, width) - side) / (stride * side))
    assert (np.diff(plan.sample) >= 0).all()
