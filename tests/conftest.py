"""Fixtures that many tests share: a private cache, and tiny configurations."""

import logging
import os

import pytest
import torch
from fastmim.kernels import _dispatch

from fastmim import recipes


def pytest_configure(config):
    """On a machine with GPUs too, all but `-m gpu` is tested on the CPU, with as many ranks as a test wants."""
    if config.option.markexpr == "not gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the index cache of the person who runs it."""
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def own_logging():
    """A command that a test runs in this process sets up logging for good; the next test starts without."""
    logger = logging.getLogger("fastmim")
    before = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture(params=["reference", "interpret", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request, monkeypatch):
    """Plain PyTorch and interpreted kernels, on the CPU; compiled kernels on a GPU, where a test's tensors then are."""
    monkeypatch.setattr(_dispatch, "MODE", "auto" if request.param == "cuda" else request.param)
    if request.param == "cuda":
        torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device(None)


@pytest.fixture
def tiny_config(tmp_path_factory):
    """A builder of small configurations: `tiny_config("mask.ratio=0.5")`.

    With another `objective.name` the decoder's size is that objective's own, as with any recipe.
    """
    recipe = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    recipe.write_text(TINY)

    def build(*overrides: str):
        return recipes.load(str(recipe), list(overrides))

    return build


TINY = """
model: {width: 32, depth: 2, heads: 2, patch_size: 8}
objective: {decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
data: {image_size: 32}
"""
