"""Two joined ranks that several benchmarks' tests share: starting them costs more than what they are asked."""

import pytest

from benchmarks.gloo import Group


@pytest.fixture(scope="session")
def pair():
    with Group(2, threads=1) as group:
        yield group


@pytest.fixture
def tiny():
    """Overrides of ViT-B's recipe that step in milliseconds."""
    return [
        *("model.size=null", "model.width=64", "model.depth=2", "model.heads=2", "data.image_size=64"),
        *("objective.decoder_width=32", "objective.decoder_depth=1", "objective.decoder_heads=2"),
        *("train.precision=fp32", "optim.batch_size=4"),
    ]
