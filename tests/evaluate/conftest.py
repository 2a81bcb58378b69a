"""Pictures that differ in colour by class, and an encoder of random weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.exchange.weights import Weights
from fastmim.models import Encoder
from fastmim.models.pixels import PixelScale

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}


def picture(colour, random):
    height, width = random.integers(36, 56, 2)
    return np.clip(random.normal(colour, 25, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def make_classes(tmp_path_factory):
    """A builder of class folders: `make_classes(red=3, green=2, seed=1)`."""

    def make(seed=0, **counts):
        root, random = tmp_path_factory.mktemp("classes"), np.random.default_rng(seed)
        for name, count in counts.items():
            (root / name).mkdir()
            for i in range(count):
                Image.fromarray(picture(COLOURS[name], random)).save(root / name / f"{name}{i:02d}.png")
        return root

    return make


@pytest.fixture(scope="session")
def train_folder(make_classes):
    return make_classes(seed=1, blue=14, green=12, red=10)


@pytest.fixture(scope="session")
def test_folder(make_classes):
    return make_classes(seed=2, blue=4, green=5, red=6)


@pytest.fixture
def weights(tiny_config, tmp_path):
    """A file of an encoder's random weights."""
    config = tiny_config()
    torch.manual_seed(0)
    encoder = Encoder(config, PixelScale(config.data.mean, config.data.std))
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    Weights(tensors, config, {"step": "7"}).save(tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"
