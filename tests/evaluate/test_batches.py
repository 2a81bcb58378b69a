"""What an evaluation decodes: every image once, centre crops as torchvision's, crops that a seed decides."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastmim.config_data import DataConfig
from fastmim.data.index import build_index
from fastmim.errors import DataError
from fastmim.evaluate.batches import centre_plan, decode, random_plan

CPU = torch.device("cpu")


def read(folder, plan_of, size, **settings):
    config = DataConfig(image_size=(32, 32), **settings)
    index = build_index(str(folder), config, progress=False)
    plan = plan_of(index, config)
    return index, plan, list(decode(index, config, plan, size, CPU))


def test_centre_crops_are_resize_256_and_center_crop_224(tmp_path):
    random = np.random.default_rng(0)
    for i, (width, height) in enumerate([(320, 256), (256, 400), (512, 512)]):
        small = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    config = DataConfig(image_size=(224, 224), flip=1.0)  # a run's flip is not an evaluation's
    index = build_index(str(tmp_path), config, progress=False)
    plan = centre_plan(index, np.arange(3), config, 224 / 256)
    images = torch.cat(list(decode(index, config, plan, 2, CPU)))
    official = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    for i, image in enumerate(images):
        with Image.open(tmp_path / f"{i}.png") as picture:
            wanted = np.asarray(official(picture.convert("RGB"))).astype(int)
        assert np.abs(image.numpy().astype(int) - wanted).mean() < 1.0


@pytest.mark.parametrize("size", [5, 36, 64])
def test_batches_hold_every_image_once_whatever_their_size(train_folder, size):
    plan_of = lambda index, config: centre_plan(index, np.arange(len(index)), config, 1.0)  # noqa: E731
    _, plan, batches = read(train_folder, plan_of, size)
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    _, _, single = read(train_folder, plan_of, 1)
    assert torch.equal(torch.cat(batches), torch.cat(single)) and len(plan) == 36


def test_an_epoch_is_a_permutation_of_the_rows_that_seed_and_epoch_decide(train_folder):
    rows = np.array([3, 8, 20, 21, 35])

    def plan(seed, epoch, **settings):
        config = DataConfig(image_size=(32, 32), samples_per_epoch=3, **settings)
        index = build_index(str(train_folder), config, progress=False)
        return random_plan(index, rows, config, seed, epoch)

    first, again, later, other = plan(1, 0), plan(1, 0), plan(1, 1), plan(2, 0)
    for told in (first, later, other):
        assert sorted(told.sample.tolist()) == rows.tolist()
    assert all(
        np.array_equal(getattr(first, name), getattr(again, name)) for name in ("sample", "top", "flip")
    )
    windows = [np.stack([told.top, told.left, told.height, told.width]) for told in (first, later, other)]
    assert not np.array_equal(windows[0], windows[1]) and not np.array_equal(windows[0], windows[2])


def test_a_damaged_image_is_named(make_classes):
    folder = make_classes(seed=5, red=6)
    config = DataConfig(image_size=(32, 32))
    index = build_index(str(folder), config, progress=False)
    path = folder / "red" / "red04.png"
    data = path.read_bytes()
    path.write_bytes(data[:60] + b"\0" * (len(data) - 80) + data[-20:])
    with pytest.raises(DataError, match=r"red04\.png cannot be decoded \(damaged or truncated pixels\)"):
        list(decode(index, config, centre_plan(index, np.arange(6), config, 1.0), 2, CPU))
