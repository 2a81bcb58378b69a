"""COCO's files: what is read of them, and what is refused."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from fastmim.config_data import DataConfig
from fastmim.errors import DataError
from fastmim.evaluate.detect.annotations import check_same_categories, read_boxed
from fastmim.evaluate.detect.coco import bitmap

DATA = DataConfig()
SQUARE = [[4.0, 2.0, 10.0, 2.0, 10.0, 8.0, 4.0, 8.0]]


def annotation(number, image, **changes):
    told = {"id": number, "image_id": image, "category_id": 3, "bbox": [4, 2, 6, 6], "area": 36, "iscrowd": 0}
    return told | {"segmentation": SQUARE} | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("boxed")
    (root / "below").mkdir()
    for name in ("a.png", "below/b.png", "c.png", "unnamed.png"):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / name)
    (root / "broken.png").write_bytes(b"nothing")
    return root


@pytest.fixture
def told():
    names = {7: "c.png", 5: "below/b.png", 9: "a.png"}
    return {
        "images": [{"id": i, "file_name": n, "height": 20, "width": 30} for i, n in names.items()],
        "annotations": [
            annotation(0, 5),
            annotation(1, 5, category_id=1),
            annotation(2, 9, iscrowd=1, segmentation={"size": [20, 30], "counts": [0, 600]}),
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}],
    }


@pytest.fixture
def read(folder, tmp_path):
    def run(told, masks=True, drop_empty=False):
        path = tmp_path / "told.json"
        path.write_text(told if isinstance(told, str) else json.dumps(told))
        return read_boxed(str(folder), str(path), DATA, "--data", masks, drop_empty)

    return run


def test_objects_are_those_of_their_images(read, told):
    images = read(told)
    names = [images.index.names[row].decode() for row in images.rows.tolist()]
    assert names == ["a.png", "below/b.png", "c.png"] and "unnamed.png" in map(
        bytes.decode, images.index.names
    )
    counts = {name: len(images.objects[row]) for name, row in zip(names, images.rows.tolist(), strict=True)}
    assert counts == {"a.png": 1, "below/b.png": 2, "c.png": 0}
    assert images.categories == {1: "dog", 3: "cat"} and list(images.categories) == [1, 3]
    described = images.described()
    assert (described["images"], described["objects"], described["classes"]) == (3, 3, 2)
    learned = images.with_objects()
    assert [images.index.names[row] for row in learned.rows.tolist()] == [b"below/b.png"], (
        "a crowd is no object"
    )
    told["annotations"] = told["annotations"][2:]
    with pytest.raises(
        DataError, match="none of the 3 annotated images of --data has an object that is no crowd"
    ):
        read(told).with_objects()


def test_the_fingerprint_is_of_what_is_read(read, told):
    first = read(told).fingerprint()
    assert first == read(copy.deepcopy(told)).fingerprint() != read(told, masks=False).fingerprint()
    told["annotations"][0]["note"] = "x"
    told["annotations"][0]["id"] = 77
    assert read(told).fingerprint() == first
    told["annotations"][0]["bbox"] = [4, 2, 6, 5]
    assert read(told).fingerprint() != first


def test_a_share_is_held_out_by_the_seed(read, told):
    images = read(told)
    train, test = images.hold_out(0.3, 1)
    assert sorted([*train.rows, *test.rows]) == images.rows.tolist() and len(test) == 1
    assert [part.rows.tolist() for part in images.hold_out(0.3, 1)] == [
        train.rows.tolist(),
        test.rows.tolist(),
    ]
    assert len({int(images.hold_out(0.3, seed)[1].rows[0]) for seed in range(9)}) == 3
    with pytest.raises(DataError, match=r"test_share=0\.9 leaves none of the 3 images"):
        images.hold_out(0.9, 1)


def test_every_form_of_a_segmentation_is_the_same_pixels():
    from pycocotools import mask

    wanted = np.zeros((20, 30), np.uint8)
    wanted[2:8, 4:10] = 1
    packed = mask.encode(np.asfortranarray(wanted))
    packed = {"size": packed["size"], "counts": packed["counts"].decode()}
    runs = {"size": [20, 30], "counts": [4 * 20 + 2, *[6, 14] * 5, 6, 12 + 20 * 20]}
    halves = [[4, 2, 7, 2, 7, 8, 4, 8], [7, 2, 10, 2, 10, 8, 7, 8]]
    for form in (SQUARE, packed, runs, halves):
        np.testing.assert_array_equal(bitmap(form, (20, 30)), wanted)


def test_boxes_without_an_area_can_be_left_out(read, told):
    told["annotations"][0]["bbox"] = [4, 2, 0, 6]
    with pytest.raises(
        DataError, match=r"annotation 0 has the box .* without an area; .* drop_empty_boxes=true"
    ):
        read(told)
    assert read(told, drop_empty=True).described()["objects"] == 2


def change(part, place, **values):
    return lambda told: told[part][place].update(values)


def lose(part, place, key):
    return lambda told: told[part][place].pop(key)


REFUSED = {
    "has no list `categories`": lambda told: told.pop("categories"),
    r"images\[1\] has no `file_name`; expected id, file_name, height, width": lose("images", 1, "file_name"),
    r"annotations\[2\] has no `bbox`": lose("annotations", 2, "bbox"),
    r"annotations\[1\] has image_id='5'; expected int": change("annotations", 1, image_id="5"),
    r"annotations\[1\] has area=None; expected int | float": change("annotations", 1, area=None),
    "names d.png, which is not in": change("images", 0, file_name="d.png"),
    "names broken.png, which cannot be used": change("images", 0, file_name="broken.png"),
    "c.png is 30x20 pixels; its file is 20x30": change("images", 0, height=30, width=20),
    "two images of id=5": change("images", 0, id=5),
    "names 3 images, but 2 files": change("images", 0, file_name="a.png"),
    "annotation 1 is of image_id=4, which `images` does not have": change("annotations", 1, image_id=4),
    "annotation 1 is of category_id=2, which": change("annotations", 1, category_id=2),
    "2 categories of 1 identifiers and 1 names": change("categories", 0, id=1),
    "2 categories of 2 identifiers and 1 names": change("categories", 0, name="dog"),
    r"annotation 0 has the box \[26, 2, 6, 6\], outside .*b.png of 20x30": change(
        "annotations", 0, bbox=[26, 2, 6, 6]
    ),
    r"the box \[4, -2, 6, 6\], outside": change("annotations", 0, bbox=[4, -2, 6, 6]),
    "bbox=\\[1, 2, 3\\]; expected four numbers": change("annotations", 0, bbox=[1, 2, 3]),
    "bbox=.*nan.*; expected four numbers": change("annotations", 0, bbox=[1, 2, float("nan"), 3]),
    "no polygon or RLE in `segmentation`; expected one, or head=faster_rcnn": lose(
        "annotations", 0, "segmentation"
    ),
    r"RLE of size=\[30, 20\]; expected `counts` and \[20, 30\]": change(
        "annotations", 0, segmentation={"size": [30, 20], "counts": [600]}
    ),
}


@pytest.mark.parametrize("shown", REFUSED)
def test_what_does_not_fit_is_refused(read, told, shown):
    REFUSED[shown](told)
    with pytest.raises(DataError, match=shown) as error:
        read(told)
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_annotations_is_refused(read, folder, tmp_path):
    with pytest.raises(DataError, match=r"told\.json is no JSON"):
        read("{")
    with pytest.raises(DataError, match="has no list `images`"):
        read("[]")
    np.save(tmp_path / "x.npy", np.zeros((2, 20, 30, 3), np.uint8))
    with pytest.raises(DataError, match="is a npy source; expected a folder"):
        (tmp_path / "empty.json").write_text('{"images": [], "annotations": [], "categories": []}')
        read_boxed(str(tmp_path / "x.npy"), str(tmp_path / "empty.json"), DATA, "--data", False, False)


def test_a_rounded_box_is_inside_and_masks_are_asked_for_only_where_they_are_learned(read, told):
    told["annotations"][0]["bbox"] = [-0.4, 2, 30.9, 18.5]
    del told["annotations"][1]["segmentation"]
    assert len(read(told, masks=False)) == 3


def test_other_categories_are_named(read, told):
    train = read(told)
    check_same_categories(train, read(told))
    told["categories"][0]["name"] = "bird"
    with pytest.raises(DataError, match="category 3 is 'cat' in annotations and 'bird' in test_annotations"):
        check_same_categories(train, read(told))
    told["categories"][0] |= {"id": 3, "name": "cat"}
    told["categories"].append({"id": 2, "name": "bird"})
    with pytest.raises(DataError, match="category 2 is None in annotations and 'bird'"):
        check_same_categories(train, read(told))
