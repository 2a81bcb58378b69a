import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastmim.data.loader import load_images


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path, photo, index_of, names, encoded):
    photo(40, 50).save(tmp_path / "good.jpg")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "notes.txt").write_text("notes")
    jpeg, png = encoded(photo(100, 100), "jpg"), encoded(photo(100, 100))
    (tmp_path / "header.jpg").write_bytes(jpeg[:100])
    (tmp_path / "header.png").write_bytes(png[:20])
    (tmp_path / "body.jpg").write_bytes(jpeg[:-200])
    (tmp_path / "body.png").write_bytes(png[:-200])
    (tmp_path / "header.tiff").write_bytes(encoded(photo(100, 100), "tiff")[:60])
    (tmp_path / "body.webp").write_bytes(encoded(photo(100, 100), "webp")[:-50])
    photo(400, 500).save(tmp_path / "wide.png")
    photo(30, 30).save(tmp_path / "grey.gif")
    Image.new("F", (20, 20)).save(tmp_path / "float.tiff")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(png + b"\0" * 300_000)
    index = index_of(tmp_path, max_pixels=100_000, max_file_bytes=300_000)
    assert names(index) == ["good.jpg"]
    reasons = dict(index.rejected)
    expected = {
        "empty.png": "empty file",
        "text.jpg": "not a JPEG",
        "notes.txt": "not a JPEG",
        "header.jpg": "unreadable (",
        "header.png": "unreadable (",
        "header.tiff": "unreadable (",
        "body.jpg": "no EOI marker",
        "body.png": "no IEND chunk",
        "body.webp": "unreadable (",
        "wide.png": "data.max_pixels=100000",
        "grey.gif": "not a JPEG",
        "float.tiff": "pixels of mode F",
        "pipe.png": "neither a file nor a folder",
        "large.png": "data.max_file_bytes=300000",
    }
    assert reasons.keys() == expected.keys()
    for location, reason in expected.items():
        assert reason in reasons[location]
    assert "14 left out" in index.summary()


def test_an_end_marker_counts_behind_the_pixels_only(tmp_path, photo, index_of, names, encoded):
    """Bytes after the image are harmless; the end of an EXIF thumbnail is not the image's."""
    jpeg = encoded(photo(64, 64), "jpg")
    (tmp_path / "trailing.jpg").write_bytes(jpeg + b"\0" * 200_000)
    (tmp_path / "trailing.png").write_bytes(encoded(photo(64, 64)) + b"\0" * 200_000)
    thumbnail = b"\xff\xe1" + (len(jpeg) + 2).to_bytes(2, "big") + jpeg
    (tmp_path / "thumbnail.jpg").write_bytes(jpeg[:2] + thumbnail + jpeg[2:-100])
    index = index_of(tmp_path)
    assert names(index) == ["trailing.jpg", "trailing.png"]
    assert [location for location, _ in index.rejected] == ["thumbnail.jpg"]


def test_sizes_are_upright(tmp_path, photo, index_of):
    for suffix in ("jpg", "png", "tiff"):
        exif = Image.Exif()
        exif[0x0112] = 8
        photo(40, 70).save(tmp_path / f"a.{suffix}", exif=exif)
    index = index_of(tmp_path)
    assert index.heights.tolist() == [70] * 3 and index.widths.tolist() == [40] * 3


@pytest.mark.parametrize(
    "suffix, entries, declared, expected",
    [
        ("jpg", [(0x112, 3, 1, 6)], 1, (70, 40)),
        ("jpg", [(0x112, 3, 1, 1), (0x10F, 2, 5000, 9999)], 2, (40, 70)),
        ("jpg", [(0x112, 3, 1, 3)], 200, (40, 70)),
        ("jpg", [(0x112, 3, 1, 6)], 200, "damaged EXIF block"),
        ("jpg", [(0x112, 3, 1, 6), (0x10F, 2, 5000, 9999)], 2, "damaged EXIF block"),
        ("jpg", [(0x112, 2, 1, 6)], 1, "damaged EXIF block"),
        ("webp", [(0x112, 3, 1, 6)], 1, (70, 40)),
        ("png", [(0x112, 3, 1, 6)], 1, (70, 40)),
        ("png", [(0x112, 3, 1, 1)], 200, "damaged EXIF block"),
    ],
)
def test_an_image_is_turned_as_the_decoder_turns_it(
    suffix, entries, declared, expected, tmp_path, photo, index_of, configure, names
):
    """Damaged EXIF blocks pass where they cannot matter; in PNG files they end DALI's process."""
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, declared)
    block += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    photo(40, 70).save(tmp_path / f"a.{suffix}", exif=block)
    photo(9, 9).save(tmp_path / "b.png")
    index = index_of(tmp_path)
    if isinstance(expected, str):
        assert names(index) == ["b.png"] and expected in index.rejected[0][1]
    else:
        assert (index.heights[0], index.widths[0]) == expected
        picture = load_images(index, configure(image_size=expected), 1)[0].double()
        upright = np.asarray(photo(40, 70), float)
        upright = np.rot90(upright, -1) if expected == (70, 40) else upright
        turned = np.rot90(upright, 2)
        distance = min(np.abs(picture.numpy() - each).mean() for each in (upright, turned))
        assert distance < 12


@pytest.mark.parametrize("declared, expected", [(1, ["late.png"]), (200, [])])
def test_exif_behind_the_pixels_of_a_png_counts(
    declared, expected, tmp_path, photo, index_of, configure, names, encoded
):
    block = b"II*\0" + struct.pack("<IHHHIII", 8, declared, 0x112, 3, 1, 6, 0)
    chunk = b"eXIf" + block
    chunk = struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png = encoded(photo(40, 70))
    (tmp_path / "late.png").write_bytes(png[:-12] + chunk + png[-12:])
    photo(9, 9).save(tmp_path / "small.png")
    index = index_of(tmp_path)
    assert names(index) == [*expected, "small.png"]
    if expected:
        assert (index.heights[0], index.widths[0]) == (70, 40)
        upright = np.rot90(np.asarray(photo(40, 70)), -1)
        np.testing.assert_array_equal(load_images(index, configure(image_size=(70, 40)), 1)[0], upright)
