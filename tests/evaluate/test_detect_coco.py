"""COCO's figures, and what is taken for what, where they are known."""

import numpy as np
import pytest
from PIL import Image

from fastmim.config_data import DataConfig
from fastmim.data.index import build_index
from fastmim.evaluate.detect.annotations import BoxedImages
from fastmim.evaluate.detect.coco import FIGURES, Detections, bitmap, encode, measure
from fastmim.evaluate.detect.confusion import box_confusion


def thing(x, y, width, height, kind=4, crowd=0, **more):
    told = {
        "id": 0,
        "category_id": kind,
        "bbox": [x, y, width, height],
        "area": width * height,
        "iscrowd": crowd,
    }
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return told | {"segmentation": [list(map(float, corners))]} | more


def found(*boxes, kind=4, masks=None):
    """Boxes (x, y, width, height, score)."""
    rows = np.array(boxes, float).reshape(-1, 5)
    corners = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)
    return Detections(corners, rows[:, 4], np.full(len(rows), kind), masks)


@pytest.fixture
def images(tmp_path):
    for name in "ab":
        Image.fromarray(np.zeros((120, 160), np.uint8)).save(tmp_path / f"{name}.png")
    index = build_index(str(tmp_path), DataConfig(), progress=False)

    def build(first, second, masks=False):
        return BoxedImages(index, np.arange(2), {0: first, 1: second}, {4: "cat", 9: "dog"}, masks)

    return build


def test_perfect_predictions_score_one_and_none_score_zero(images):
    things = [[thing(5, 6, 20, 20), thing(60, 50, 50, 60, kind=9)], [thing(30, 20, 110, 96)]]
    some = images(*things, masks=True)
    masks = {
        row: encode(np.stack([bitmap(each["segmentation"], (120, 160)) for each in things[row]]))
        for row in (0, 1)
    }
    perfect = {
        row: Detections(
            np.array([[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in things[row])], float),
            np.full(len(things[row]), 0.9),
            np.array([each["category_id"] for each in things[row]]),
            masks[row],
        )
        for row in (0, 1)
    }
    told = measure(some, perfect)
    for key in ("box", "mask"):
        assert tuple(told[key]) == FIGURES
        assert [
            told[key][name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
        ] == pytest.approx([1] * 7)
    one = {"box_AP": 1, "box_AP50": 1, "mask_AP": 1, "mask_AP50": 1}
    assert told["per_class"]["cat"] == pytest.approx({"objects": 2, **one})
    assert told["per_class"]["dog"] == pytest.approx({"objects": 1, **one})
    told = measure(some, {0: found(masks=[]), 1: found(masks=[])})
    assert told["box"] == dict.fromkeys(FIGURES, 0) == told["mask"]


def test_figures_computed_by_hand(images):
    """Three objects; by score one is found exactly, one box is of nothing, and one found box overlaps by 77/123."""
    some = images([thing(10, 10, 100, 10), thing(10, 60, 100, 10)], [thing(20, 20, 100, 10)])
    told = measure(
        some, {0: found((10, 10, 100, 10, 0.9), (5, 100, 30, 9, 0.8)), 1: found((43, 20, 100, 10, 0.7))}
    )
    # Recall is 1/3 with precision 1, then 2/3 with precision 2/3, at 34 and 33 of 101 recalls.
    up_to_60, above = (34 + 33 * 2 / 3) / 101, 34 / 101
    assert told["box"]["AP50"] == pytest.approx(up_to_60)
    assert told["box"]["AP75"] == pytest.approx(above)
    assert told["box"]["AP"] == pytest.approx((3 * up_to_60 + 7 * above) / 10)
    assert told["box"]["AR1"] == pytest.approx((3 * 2 / 3 + 7 * 1 / 3) / 10)
    assert told["box"]["APm"] is None and told["box"]["APl"] is None
    assert told["per_class"]["cat"]["box_AP50"] == pytest.approx(up_to_60)
    assert told["per_class"]["dog"] == {"objects": 0, "box_AP": None, "box_AP50": None}
    assert "mask" not in told


def test_crowds_count_for_nothing(images):
    crowd = thing(80, 60, 60, 50, crowd=1)
    some = images([thing(10, 10, 30, 30), crowd], [])
    told = measure(some, {0: found((85, 65, 20, 20, 0.9), (10, 10, 30, 30, 0.5)), 1: found()})
    assert told["box"]["AP"] == pytest.approx(1) and told["per_class"]["cat"]["objects"] == 1


def test_another_category_is_another_object(images):
    some = images([thing(10, 10, 30, 30)], [])
    assert measure(some, {0: found((10, 10, 30, 30, 0.9), kind=9), 1: found()})["box"]["AP"] == 0


def test_boxes_take_the_object_that_they_overlap_most_once_the_surest_first(images):
    some = images(
        [thing(0, 0, 40, 40), thing(20, 0, 40, 40, kind=9), thing(100, 60, 50, 50, crowd=1)],
        [thing(5, 5, 30, 30, kind=9)],
    )
    boxes = [
        (0, 0, 40, 40, 0.9),  # the cat
        (1, 0, 40, 40, 0.8),  # the cat again, which is taken; of the dog too little
        (25, 0, 40, 40, 0.7),  # the dog
        (110, 70, 20, 20, 0.6),  # within the crowd
        (20, 0, 40, 40, 0.4),  # not sure
    ]
    # The last image's dog is not found: too far off by half.
    result = box_confusion(some, {0: found(*boxes), 1: found((20, 5, 30, 30, 0.9), kind=9)}, 0.5)
    assert result.tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0]]
    none = box_confusion(some, {0: found(), 1: found()}, 0.5)
    assert none.tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]
    empty = box_confusion(images([], []), {0: found((0, 0, 9, 9, 0.5)), 1: found()}, 0.5)
    assert empty.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
