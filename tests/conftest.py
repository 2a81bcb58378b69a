"""Fixtures that many tests share: a private cache, and tiny configurations."""

import pytest

from fastmim import recipes


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the index cache of the person who runs it."""
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tiny_config():
    """A builder of small configurations: `tiny_config("mask.ratio=0.5")`."""

    def build(*overrides: str):
        return recipes.override([*TINY, *overrides])

    return build


TINY = [
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.patch_size=8",
    "objective.decoder_width=16",
    "objective.decoder_depth=1",
    "objective.decoder_heads=2",
    "data.image_size=32",
]
