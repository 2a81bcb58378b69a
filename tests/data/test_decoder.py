"""Pixels of real pipelines on real files, against Pillow and torchvision."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from fastmim.data.decoder import Decoder
from fastmim.data.index import build_index
from fastmim.data.loader import load_images
from fastmim.data.schedule import Schedule

CPU = torch.device("cpu")


def decode(source, config, positions, seed=0):
    index = build_index(str(source), config, progress=False)
    plan = Schedule(index.heights, index.widths, seed, config).plan(np.arange(positions))
    decoder = Decoder(index, config, CPU, batch_size=positions, threads=1)
    decoder.start(plan)
    return index, plan, decoder.result()


def expected_image(picture, plan, row, size):
    window = (int(part[row]) for part in (plan.top, plan.left, plan.height, plan.width))
    picture = tvf.resized_crop(picture, *window, list(size), InterpolationMode.BICUBIC, antialias=True)
    if plan.flip[row]:
        picture = ImageOps.mirror(picture)
    return np.asarray(picture, np.float64).reshape(*size, -1)


def assert_close(images, pictures, plan, size, tolerance=2.0):
    for row, sample in enumerate(plan.sample):
        expected = expected_image(pictures[sample], plan, row, size)
        assert images[row].shape == expected.shape
        assert np.abs(images[row].numpy() - expected).mean() < tolerance


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (24, 56), (96, 40)])
def test_pixels_are_torchvisions(suffix, channels, size, make_folder, configure):
    folder = make_folder(6, suffixes=(suffix,), mode="RGB" if channels == 3 else "L")
    _, plan, images = decode(folder, configure(channels, image_size=size), 12)
    assert images.dtype == torch.uint8 and images.shape == (12, *size, channels)
    assert_close(images, [Image.open(path).copy() for path in sorted(folder.iterdir())], plan, size)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("crop", ["random_resized_crop", "center_crop"])
def test_orientation(suffix, crop, tmp_path, photo, configure):
    pictures = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        photo(50, 90).save(path, exif=exif)
        pictures.append(ImageOps.exif_transpose(Image.open(path)))
    index, plan, images = decode(tmp_path, configure(crop=crop, image_size=(32, 48)), 8)
    np.testing.assert_array_equal(index.heights, [50] * 4 + [90] * 4)
    assert_close(images, pictures, plan, (32, 48))


def test_orientation_of_tiff(tmp_path, photo, configure):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(50, 90).save(tmp_path / "a.tiff", exif=exif)
    index, plan, images = decode(tmp_path, configure(), 1)
    assert (index.heights[0], index.widths[0]) == (90, 50)
    assert_close(images, [ImageOps.exif_transpose(Image.open(tmp_path / "a.tiff"))], plan, (32, 32))


FORMATS = [
    ("jpg", "L"), ("jpg", "RGB"), ("jpg", "CMYK"),
    ("png", "1"), ("png", "L"), ("png", "LA"), ("png", "P"), ("png", "RGB"), ("png", "RGBA"),
    ("webp", "RGB"), ("webp", "RGBA"),
    ("tiff", "L"), ("tiff", "P"), ("tiff", "RGB"), ("tiff", "RGBA"), ("tiff", "CMYK"),
    ("bmp", "1"), ("bmp", "L"), ("bmp", "P"), ("bmp", "RGB"),
    ("ppm", "L"), ("ppm", "RGB"),
    ("jp2", "L"), ("jp2", "RGB"), ("jp2", "RGBA"),
]  # fmt: skip


@pytest.mark.parametrize("suffix, mode", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_accepted_mode_becomes_grey_or_rgb(suffix, mode, channels, tmp_path, photo, configure):
    path = tmp_path / f"a.{suffix}"
    photo(60, 80).convert(mode).save(path)
    _, plan, images = decode(tmp_path, configure(channels), 2)
    picture = Image.open(path).convert("RGB").convert("RGB" if channels == 3 else "L")
    # Pillow rounds to bytes between its two passes, which tells where neighbours are black and white.
    assert_close(images, [picture], plan, (32, 32), tolerance=4.0 if mode == "1" else 2.0)


@pytest.mark.parametrize("suffix", ["png", "tiff", "jp2", "pgm"])
def test_sixteen_bits_keep_their_high_byte(suffix, tmp_path, photo, configure):
    grey = photo(60, 80, "L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    wide.save(tmp_path / f"a.{suffix}", format="PPM" if suffix == "pgm" else None)
    _, plan, images = decode(tmp_path, configure(1), 2)
    assert_close(images, [grey], plan, (32, 32))


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jp2"])
def test_alpha_is_kept_for_four_channels(suffix, tmp_path, photo, configure):
    picture = photo(60, 80, "RGBA")
    picture.putalpha(photo(60, 80, "L", seed=3))
    picture.save(tmp_path / f"a.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    photo(60, 80).save(tmp_path / "b.png")
    index, plan, images = decode(tmp_path, configure(4, crop="center_crop", image_size=(60, 80)), 1)
    assert index.rejected == (("b.png", "pixels of mode RGB; expected data.channels=4"),)
    expected = np.asarray(picture)[:, ::-1] if plan.flip[0] else np.asarray(picture)
    np.testing.assert_array_equal(images[0].numpy(), expected)


@pytest.fixture
def same_images(tmp_path, photo):
    """Five images of one size as a folder of PNG files, two tar shards of them, and an .npy array."""
    folder = tmp_path / "folder"
    folder.mkdir()
    pictures = [photo(48, 64, seed=i) for i in range(5)]
    for shard, part in enumerate((pictures[:3], pictures[3:])):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for picture in part:
                name = f"{pictures.index(picture):03}"
                picture.save(folder / f"{name}.png")
                for member, data in ((f"{name}.png", None), (f"{name}.cls", b"7")):
                    data = data or (folder / member).read_bytes()
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    np.save(tmp_path / "array.npy", np.stack([np.asarray(picture) for picture in pictures]))
    return {"folder": folder, "tar": tmp_path / "shard-*.tar", "npy": tmp_path / "array.npy"}


@pytest.mark.parametrize("channels", [1, 3])
def test_the_three_sources_give_equal_batches(same_images, channels, configure):
    config = configure(channels, color_jitter={"hue": 0.1})
    decoded = {kind: decode(source, config, 10) for kind, source in same_images.items()}
    assert {kind: index.kind for kind, (index, _, _) in decoded.items()} == {k: k for k in same_images}
    assert torch.equal(decoded["folder"][2], decoded["tar"][2])
    if channels == 3:
        assert torch.equal(decoded["folder"][2], decoded["npy"][2])
    else:  # the decoder and the conversion of arrays round grey differently
        difference = decoded["folder"][2].int() - decoded["npy"][2].int()
        assert difference.abs().double().mean() < 1


@pytest.mark.parametrize("stored, channels", [(None, 1), (1, 1), (4, 4), (2, 2), (13, 13), (None, 3), (1, 3)])
def test_arrays_of_any_channels(stored, channels, tmp_path, configure):
    rng = np.random.default_rng(0)
    shape = (3, 20, 30) if stored is None else (3, 20, 30, stored)
    array = rng.integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    config = configure(channels, crop="center_crop", image_size=(20, 30), flip=0.0)
    _, plan, images = decode(tmp_path / "a.npy", config, 3)
    wanted = array.reshape(3, 20, 30, -1)[plan.sample]
    np.testing.assert_array_equal(images.numpy(), np.broadcast_to(wanted, images.shape))


def test_color_factors_change_pixels_as_they_say(tmp_path, configure):
    Image.new("RGB", (40, 40), (100, 100, 100)).save(tmp_path / "a.png")
    jitter = {"brightness": 0.5, "contrast": 0.0, "saturation": 0.5, "hue": 0.2}
    _, plan, images = decode(tmp_path, configure(color_jitter=jitter), 8)
    expected = 100 * plan.color[:, 0]
    assert np.abs(images.numpy().mean((1, 2, 3)) - expected).max() < 1.5
    _, plan, images = decode(tmp_path, configure(1, color_jitter={"brightness": 0.0, "contrast": 0.5}), 8)
    expected = 128 + (100 - 128) * plan.color[:, 1]
    assert np.abs(images.numpy().mean((1, 2, 3)) - expected).max() < 1.5


def test_load_images_is_centred_and_unflipped(make_folder, configure):
    folder = make_folder(70, suffixes=("png",))
    config = configure(flip=1.0, color_jitter={"brightness": 0.9})
    index = build_index(str(folder), config, progress=False)
    images = load_images(index, config, 68)
    assert images.shape == (68, 32, 32, 3)
    for row in (0, 63, 64, 67):
        picture = Image.open(folder / f"{row:03}.png")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        expected = picture.resize((32, 32), Image.Resampling.BICUBIC, box)
        assert np.abs(images[row].numpy() - np.asarray(expected, np.float64)).mean() < 2
    assert len(load_images(index, config, 1000)) == 70
