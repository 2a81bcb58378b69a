"""facebookresearch/mae, from a user's clone: its licence does not allow a copy here."""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from fastmim.config import Config

FILE = "models_mae.py"


def build_published(clone: Path, config: Config) -> nn.Module:
    """The clone's `MaskedAutoencoderViT`.

    It was written for timm 0.3.2 and NumPy 1: an option of timm's blocks that was never set, and a name for Python's
    float, have gone since. They are given back while it is built.

    Raises:
        FileNotFoundError: no clone is there.
    """
    if not (clone / FILE).exists():
        raise FileNotFoundError(
            f"--mae-path {clone} holds no {FILE}; expected a clone of facebookresearch/mae"
        )
    model, objective = config.model, config.objective
    spec = importlib.util.spec_from_file_location("models_mae", clone / FILE)
    published = importlib.util.module_from_spec(spec)
    with _path(clone), mock.patch.object(np, "float", float, create=True):
        spec.loader.exec_module(published)
        published.Block = _without_scale(published.Block)
        return published.MaskedAutoencoderViT(
            img_size=config.data.image_size[0],
            patch_size=model.patch_size,
            in_chans=config.data.channels,
            embed_dim=model.width,
            depth=model.depth,
            num_heads=model.heads,
            decoder_embed_dim=objective.decoder_width,
            decoder_depth=objective.decoder_depth,
            decoder_num_heads=objective.decoder_heads,
            mlp_ratio=model.mlp_ratio,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            norm_pix_loss=objective.norm_pix_loss,
        )


@contextlib.contextmanager
def given_noise(noise: Tensor) -> Iterator[None]:
    """`torch.rand` returns this: the one way to tell it a mask."""
    with mock.patch.object(torch, "rand", lambda *size, **options: noise):
        yield


def _without_scale(block: type[nn.Module]):
    def build(*args, qk_scale: None = None, **options):
        assert qk_scale is None
        return block(*args, **options)

    return build


@contextlib.contextmanager
def _path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
