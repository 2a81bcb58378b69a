"""IDX files become arrays that the engine reads; damaged ones are told by name."""

import gzip
import struct

import numpy as np
import pytest

from fastmim.cli import main
from fastmim.config_data import DataConfig
from fastmim.data.idx import prepare_idx, read_idx
from fastmim.errors import DataError
from fastmim.evaluate.labels import read_labelled

SIZES = {"train": 40, "t10k": 20}


def write(path, array, packed=False):
    """By the format's description: two zero bytes, a type, the number of sizes, the sizes, the values."""
    data = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    if packed:
        path = path.with_name(path.name + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return {
        name: (random.integers(0, 256, (n, 5, 7), dtype=np.uint8), (np.arange(n) % 4).astype(np.uint8))
        for name, n in SIZES.items()
    }


@pytest.fixture
def folder(tmp_path, arrays):
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, (images, labels) in arrays.items():
        write(folder / f"{name}-images-idx3-ubyte", images, packed=name == "train")
        write(folder / f"{name}-labels-idx1-ubyte", labels, packed=name == "t10k")
    return folder


@pytest.mark.parametrize("name", ["fashion-mnist", "idx"])
def test_the_arrays_are_a_labelled_source(folder, arrays, tmp_path, capsys, name):
    out = tmp_path / "out"
    assert main(["data", name, "--idx", str(folder), "--out", str(out)]) == 0
    assert "train.npy and test.npy" in capsys.readouterr().out
    for prefix, part in {"train": "train", "t10k": "test"}.items():
        images = np.load(out / f"{part}.npy")
        assert images.dtype == np.uint8 and np.array_equal(images, arrays[prefix][0][..., None])
        config = DataConfig(image_size=(5, 7), channels=1)
        read = read_labelled(str(out / f"{part}.npy"), config, str(out / f"{part}_labels.npy"), "--data")
        assert np.array_equal(read.labels, arrays[prefix][1]) and read.class_names == ("0", "1", "2", "3")
    before = (out / "train.npy").stat().st_mtime_ns
    assert main(["data", name, "--idx", str(folder), "--out", str(out)]) == 0
    assert (out / "train.npy").stat().st_mtime_ns == before


def damage(folder, case):
    """Spoil a set; returns the file that is to be named and what is to be said of it."""
    images, labels = folder / "t10k-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte.gz"
    packed = folder / "train-images-idx3-ubyte.gz"
    if case == "truncated":
        images.write_bytes(images.read_bytes()[:-3])
        return images, r"holds 697 bytes after its header; expected 700, for \[20, 5, 7\]"
    if case == "too long":
        images.write_bytes(images.read_bytes() + b"x")
        return images, "holds 701 bytes after its header; expected 700"
    if case == "header only":
        images.write_bytes(images.read_bytes()[:9])
        return images, "begins with 00 00 08 03 and has 9 bytes; expected 00 00 08 03"
    if case == "nothing":
        images.write_bytes(b"")
        return images, "begins with nothing and has 0 bytes"
    if case == "floats":
        images.write_bytes(b"\0\0\x0d\x03" + images.read_bytes()[4:])
        return images, "begins with 00 00 0d 03 .* expected 00 00 08 03"
    if case == "labels for images":
        images.write_bytes(gzip.decompress(labels.read_bytes()))
        return images, "begins with 00 00 08 01 .* in 3 dimensions"
    if case == "half a .gz":
        packed.write_bytes(packed.read_bytes()[:200])
        return packed, "cannot be unpacked .* expected a whole .gz file"
    if case == "damaged .gz":
        data = bytearray(packed.read_bytes())
        data[300:330] = bytes(30)
        packed.write_bytes(data)
        return packed, "cannot be unpacked"
    if case == "fewer labels":
        write(folder / "t10k-labels-idx1-ubyte", np.zeros(19, np.uint8))
        return (
            folder / "t10k-labels-idx1-ubyte",
            "holds 19 labels; expected 20, one an image of .*t10k-images",
        )
    labels.unlink()
    return folder, "holds no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"


CASES = ["truncated", "too long", "header only", "nothing", "floats", "labels for images", "half a .gz"]


@pytest.mark.parametrize("case", [*CASES, "damaged .gz", "fewer labels", "missing"])
def test_a_damaged_set_is_named_and_leaves_nothing(folder, tmp_path, case):
    path, message = damage(folder, case)
    with pytest.raises(DataError, match=f"^{path} {message}"):
        prepare_idx(folder, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["idx"]


def test_an_empty_array_is_refused(tmp_path):
    path = write(tmp_path / "none", np.zeros((0, 5, 7), np.uint8))
    with pytest.raises(
        DataError, match=r"holds 0 bytes after its header; expected 0, for \[0, 5, 7\], not empty"
    ):
        read_idx(path, 3)


def test_options_that_do_not_fit_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    refused = {
        "idx without --idx": ["idx", "--out", "x"],
        "--idx there with elpv": ["elpv", "--idx", "there", "--out", "x"],
        "taken holds no train.npy; expected": ["idx", "--idx", str(folder), "--out", str(tmp_path / "taken")],
    }
    for message, words in refused.items():
        assert main(["data", *words]) == 2
        assert message in capsys.readouterr().err
