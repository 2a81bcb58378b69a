"""The loaders that are compared do the same work, on photographs that are what they are said to be."""

import tarfile

import pytest
from PIL import Image

from benchmarks import dataloading, loaders
from benchmarks.photographs import SIZE, write_photographs

# timm's readers leave their files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return write_photographs(folder / "q75", 4, 75)


def test_photographs(photographs):
    files = sorted(photographs.glob("*/*.jpg"))
    assert len(files) == 4 and len({file.read_bytes() for file in files}) == 4
    with Image.open(files[0]) as photograph:
        assert photograph.format == "JPEG" and photograph.mode == "RGB"
        assert photograph.size == SIZE[::-1]
        extremes = [high - low for low, high in photograph.convert("YCbCr").getextrema()]
    assert min(extremes) > 20, "no contrast in a plane"
    with tarfile.open(photographs.with_suffix(".tar")) as shard:
        assert [shard.extractfile(member).read() for member in shard] == [file.read_bytes() for file in files]


def test_same_work(photographs, monkeypatch):
    same = loaders.require_same_work(photographs, images=4, draws=1000)
    assert same["difference"] < 1 and same["timm_crop"] == pytest.approx(0.51, abs=0.03)
    monkeypatch.setitem(loaders._CROP, "scale", (0.08, 1.0))
    with pytest.raises(SystemExit, match="different work"):
        loaders.require_same_work(photographs, images=4, draws=1000)


@pytest.mark.parametrize("name", ["torchvision", "torchvision, uint8", "timm", "timm, tar"])
def test_loaders(photographs, name):
    make, kind = loaders.LOADERS[name]
    source = photographs if kind == "folder" else photographs.with_suffix(".tar")
    assert tuple(next(make(source, 3, 0)).shape) == (3, 3, 224, 224)


def test_own_loader(photographs):
    made = loaders.fastmim_batches(photographs, 3, 1)
    assert tuple(next(made).shape) == (3, 224, 224, 3)
    made.close()


def test_tables():
    row = {"variant": "fastmim", "size": "q75, 1 core", "images_per_s": 400.0, "p20_s": 0.4, "p80_s": 0.8}
    row |= {"cpu_s_per_image": 0.0025, "ratio": 2.0, "cpu_ratio": 1.5, "cpu_samples": [1.0, 2.0, 4.0]}
    alike = row | {"variant": loaders.UINT8, "cpu_samples": [1.2, 2.4, 4.4]}
    stage = {"variant": "decode", "size": "q75", "cpu_s_per_image": 0.001}
    stored = {"arguments": {"images": "128", "batch": "64"}, "rows": [alike, row], "stages": [stage]}
    made = dataloading.tables(stored)
    assert "| fastmim | q75, 1 core | 400 | 200–400 | 2.50 | 2.00 | 1.50 | 1.20 |" in made["dataloading"]
    assert "| decode | q75 | 1.00 |" in made["dataloading_stages"]
