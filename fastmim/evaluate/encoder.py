"""The encoder alone, from whatever holds its weights."""

import hashlib

import torch

from fastmim.config import Config
from fastmim.errors import CheckpointError
from fastmim.exchange.weights import Weights, read_weights
from fastmim.models import Encoder
from fastmim.models.attention import choose_attention
from fastmim.models.pixels import PixelScale

PREFIX = "encoder."


def load_encoder(path: str, ema: bool = False) -> tuple[Encoder, Config]:
    """A trained encoder in float32, for evaluation, and the configuration that it was trained with.

    Args:
        path: a run, checkpoint directory or weights file.
        ema: use the averaged weights.

    Raises:
        CheckpointError: no encoder there.
    """
    weights = read_weights(path, ema)
    return encoder_of(weights, path), weights.config


def encoder_of(weights: Weights, path: str) -> Encoder:
    """As `load_encoder`, from weights that were read from `path`."""
    config = weights.config
    tensors = {
        name.removeprefix(PREFIX): value for name, value in weights.tensors.items() if name.startswith(PREFIX)
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = PixelScale(config.data.mean, config.data.std)
    attention = choose_attention("auto", device.type)
    encoder = Encoder(config, scale, attention, mask_token="mask_token" in tensors)
    missing = encoder.state_dict().keys() - tensors.keys()
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors of an encoder such as {min(missing)}; "
            f"it was trained with objective.name={config.objective.name!r}"
        )
    wanted = encoder.state_dict()
    differing = [
        name for name, value in tensors.items() if name in wanted and value.shape != wanted[name].shape
    ]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path}: {PREFIX}{name} is {list(tensors[name].shape)}; expected {list(wanted[name].shape)}, as its own "
            "configuration says"
        )
    encoder.load_state_dict(tensors)
    return encoder.to(device).eval().requires_grad_(False)


def fingerprint_of(encoder: Encoder) -> str:
    """SHA-256 of the names and values of an encoder's weights, wherever they lie."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name}\0{list(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
