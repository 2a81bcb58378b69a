"""Which mask belongs to which image, and what masks hold."""

import numpy as np
import pytest
from PIL import Image

from fastmim.config_data import DataConfig
from fastmim.errors import ConfigError, DataError
from fastmim.evaluate.segment.masks import UNLABELLED, MaskReader, read_masked, read_names

READ = MaskReader(ignore=255, reduce_zero_label=False)


@pytest.fixture
def folders(tmp_path):
    """Three images of several sizes and their masks, one in a folder."""
    random = np.random.default_rng(0)
    for number, (name, size) in enumerate(
        {"a.jpg": (20, 24), "b/c.png": (16, 30), "d.png": (18, 18)}.items()
    ):
        image, mask = tmp_path / "images" / name, (tmp_path / "masks" / name).with_suffix(".png")
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image)
        classes = np.full(size, number, np.uint8)
        classes[:2] = 255
        Image.fromarray(classes).save(mask)
    return tmp_path


def read(folders, reader=READ, names=None, images="images", masks="masks"):
    return read_masked(str(folders / images), str(folders / masks), DataConfig(), reader, "--data", names)


def test_masks_are_found_by_name_and_number_the_classes(folders):
    found = read(folders)
    assert found.class_names == ("0", "1", "2") and len(found) == 3
    assert [path.relative_to(folders / "masks").as_posix() for path in found.paths] == [
        "a.png",
        "b/c.png",
        "d.png",
    ]
    assert np.unique(found.read(found.paths[1])).tolist() == [UNLABELLED, 1]
    assert found.described()["images"] == 3 and found.described()["classes"] == 3


def test_values_mean_what_they_are_told_to(folders):
    path = folders / "values.png"
    Image.fromarray(np.array([[0, 1, 2, 7, 255]], np.uint8)).save(path)
    assert READ(path).tolist() == [[0, 1, 2, 7, UNLABELLED]]
    assert MaskReader(7, False)(path).tolist() == [[0, 1, 2, UNLABELLED, 255]]
    assert MaskReader(255, True)(path).tolist() == [[UNLABELLED, 0, 1, 6, UNLABELLED]]


def test_a_palette_gives_numbers_and_not_colours(folders):
    mask = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    mask.putpalette([0, 0, 0, 200, 10, 10, 10, 10, 200])
    mask.save(folders / "palette.png")
    assert READ(folders / "palette.png").tolist() == [[0, 1], [2, 1]]


def test_the_fingerprint_tells_of_pixels_and_not_of_files(folders):
    before = read(folders).fingerprint()
    path = folders / "masks" / "d.png"
    classes = np.asarray(Image.open(path)).copy()
    Image.fromarray(classes).save(path, compress_level=0)
    assert read(folders).fingerprint() == before
    classes[9, 9] = 0
    Image.fromarray(classes).save(path)
    assert read(folders).fingerprint() != before
    assert read(folders, names=("x", "y", "z")).fingerprint() != read(folders).fingerprint()


def test_a_share_is_held_out_by_the_seed(folders):
    images = read(folders)
    train, test = images.hold_out(0.3, 5)
    assert len(train) == 2 and len(test) == 1
    assert sorted([*train.rows, *test.rows]) == [0, 1, 2]
    assert {int(images.hold_out(0.3, seed)[1].rows[0]) for seed in range(20)} == {0, 1, 2}
    with pytest.raises(DataError, match=r"test_share=0.9 leaves none of the 3 images"):
        images.hold_out(0.9, 0)


def save(folders, name, pixels, mode=None):
    Image.fromarray(np.asarray(pixels), mode).save(folders / "masks" / name)


def test_what_does_not_belong_together_is_refused(folders):
    names = ("x", "y")
    with pytest.raises(
        DataError, match=r"d.png holds value 2; expected at most 1, the last of 2 classes, or ignore=255"
    ):
        read(folders, names=names)
    with pytest.raises(DataError, match=r"d.png holds value 2; expected at most 1, the last of 1 classes"):
        read(folders, MaskReader(255, True), ("x",))
    good = (folders / "masks" / "d.png").read_bytes()
    save(folders, "d.png", np.zeros((18, 17), np.uint8))
    with pytest.raises(DataError, match=r"mask .*d.png is 18x17 pixels; expected 18x18, as .*d.png is"):
        read(folders)
    save(folders, "d.png", np.zeros((18, 18, 3), np.uint8))
    with pytest.raises(DataError, match=r"mask .*d.png has pixels of mode RGB; expected L or P"):
        read(folders)
    (folders / "masks" / "d.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"mask .*d.png cannot be read"):
        read(folders)
    (folders / "masks" / "d.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"mask .*d.png cannot be read .*; expected a PNG image"):
        read(folders)
    (folders / "masks" / "d.png").unlink()
    with pytest.raises(DataError, match=r"images/d.png has no mask; expected .*masks/d.png"):
        read(folders)
    with pytest.raises(DataError, match=r"masks '.*nowhere' of --data is no folder"):
        read(folders, masks="nowhere")
    (folders / "masks" / "d.png").write_bytes(good)
    (folders / "images" / "e.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"--data .*images: 1 beside 3 images cannot be used, such as e.png: "
    ):
        read(folders)
    (folders / "images" / "e.png").unlink()
    Image.new("RGB", (18, 18)).save(folders / "images" / "d.jpg")
    with pytest.raises(DataError, match=r"d.jpg and .*d.png both have the mask"):
        read(folders)


def test_masks_without_a_class_and_arrays_without_files_are_refused(folders):
    for name in ("a.png", "b/c.png", "d.png"):
        shape = np.asarray(Image.open(folders / "masks" / name)).shape
        save(folders, name, np.full(shape, 255, np.uint8))
    with pytest.raises(DataError, match="holds no labelled pixel"):
        read(folders)
    np.save(folders / "x.npy", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"x.npy is a npy source; expected a folder of images"):
        read(folders, images="x.npy")


def test_names_are_one_a_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("sky\nroad surface\n")
    assert read_names(str(path)) == ("sky", "road surface")
    for text, told in {
        "sky\n\nroad": "line 2: ''",
        "sky\nsky": "line 2: 'sky'",
        "sky": "holds 1 lines",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=told):
            read_names(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_names(str(path))
