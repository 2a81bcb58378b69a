"""Intersection over union, against counting pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.evaluate.segment.masks import UNLABELLED
from fastmim.evaluate.segment.scores import Sample, Segmentation, count_pixels, draw_samples, summary

NAMES = ("a", "b", "c", "d", "e")


def pair(seed):
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, (11, 9))  # d and e are in no mask
    predicted = np.where(
        random.random((11, 9)) < 0.6, classes, random.integers(0, 4, (11, 9))
    )  # e nowhere at all
    classes[random.random((11, 9)) < 0.2] = UNLABELLED
    return classes, predicted


def test_scores_are_those_of_counting():
    pairs = [pair(seed) for seed in range(3)]
    matrix = sum(count_pixels(torch.from_numpy(c), torch.from_numpy(p), 5) for c, p in pairs)
    told = summary(Segmentation(matrix, [], {"steps": 3}), NAMES)
    labelled = [
        (int(c), int(p)) for cs, ps in pairs for c, p in zip(cs.flat, ps.flat, strict=True) if c != UNLABELLED
    ]
    overlaps = {}
    for kind, name in enumerate(NAMES[:4]):
        both = sum(c == kind and p == kind for c, p in labelled)
        either = sum(c == kind or p == kind for c, p in labelled)
        overlaps[name] = both / either
        assert told["per_class"][name]["iou"] == pytest.approx(both / either)
        assert told["per_class"][name]["pixels"] == sum(c == kind for c, _ in labelled)
    assert told["miou"] == pytest.approx(np.mean(list(overlaps.values()))) and overlaps["d"] == 0
    assert told["per_class"]["e"] == {"pixels": 0, "iou": None, "accuracy": None}
    assert told["per_class"]["d"]["accuracy"] is None
    assert told["pixel_accuracy"] == pytest.approx(np.mean([c == p for c, p in labelled]))
    recalls = [np.mean([p == kind for c, p in labelled if c == kind]) for kind in range(3)]
    assert told["mean_class_accuracy"] == pytest.approx(np.mean(recalls)) and told["steps"] == 3


@pytest.mark.parametrize("kinds, channels", [(5, 1), (30, 3)])
def test_a_picture_shows_classes_in_colours(tmp_path, kinds, channels):
    classes, predicted = pair(0)
    sample = Sample(np.full((11, 9, channels), 100, np.uint8), classes, predicted)
    names = tuple(f"$kind {i}" for i in range(kinds))
    draw_samples(tmp_path / "x.png", [sample, sample], names, "title")
    with Image.open(tmp_path / "x.png") as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20)}
    assert {(0, 0, 0), (100, 100, 100)} <= colours
    if kinds == 5:
        assert {(204, 204, 204), (255, 127, 14), (44, 160, 44)} <= colours
