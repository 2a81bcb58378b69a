import io
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastmim.config import DataConfig
from fastmim.data import scan
from fastmim.data.index import build_index


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FASTMIM_CACHE", str(folder))
    return folder


def _photo(height, width, mode="RGB", seed=0):
    """A smooth picture with texture and no symmetry, so that a wrong turn or window shows."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noisy).filter(ImageFilter.BoxBlur(1)).convert(mode)


@pytest.fixture(scope="session")
def photo():
    return _photo


@pytest.fixture
def make_folder(tmp_path):
    """A folder of n images of varied size; JPEG and PNG in turn unless told."""

    def make(n=8, name="images", suffixes=("jpg", "png"), mode="RGB"):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(n):
            picture = _photo(40 + 3 * i % 17, 60 - 5 * i % 23, mode, seed=i)
            picture.save(folder / f"{i:03}.{suffixes[i % len(suffixes)]}")
        return folder

    return make


@pytest.fixture(scope="session")
def configure():
    def make(channels=3, **fields):
        values = {"image_size": 32, "mean": [0.5] * channels, "std": [0.5] * channels, **fields}
        return DataConfig(channels=channels, **values)

    return make


@pytest.fixture
def index_of(configure):
    def build(source, refresh=False, **fields):
        return build_index(str(source), configure(**fields), progress=False, refresh=refresh)

    return build


@pytest.fixture
def reads(monkeypatch):
    """How many headers have been read."""
    count = []
    read = scan.read_header
    monkeypatch.setattr(scan, "read_header", lambda file, size: count.append(size) or read(file, size))
    return count


def _names(index):
    return [name.decode() for name in index.names]


@pytest.fixture(scope="session")
def names():
    return _names


def _add(tar, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def add():
    return _add


def _encoded(picture, suffix="png"):
    file = io.BytesIO()
    picture.save(file, {"jpg": "JPEG"}.get(suffix, suffix))
    return file.getvalue()


@pytest.fixture(scope="session")
def encoded():
    return _encoded


def _make_shards(folder, count=3):
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(2):
                _add(tar, f"{shard}-{i}.png", _encoded(_photo(20 + shard, 30 + i)))


@pytest.fixture(scope="session")
def make_shards():
    return _make_shards
