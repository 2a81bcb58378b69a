"""Discrete visual tokens of images, from a trained discrete autoencoder or DALL-E's released encoder."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fastmim import manifest as manifests
from fastmim import recipes
from fastmim.errors import CheckpointError
from fastmim.models.dalle import PIXEL_MEAN, PIXEL_STD, read_dalle_encoder
from fastmim.models.dvae import DVAEEncoder
from fastmim.models.pixels import PixelScale

_AT_ONCE = 64


class Tokenizer(nn.Module):
    """Gives each cell of a grid over an image the most likely token of an encoder.

    Args:
        encoder: of a discrete autoencoder.
        scale: the pixel statistics that it was trained with.

    Attributes:
        tokens: size of the vocabulary.
        channels: of the images.
    """

    def __init__(self, encoder: DVAEEncoder, scale: PixelScale):
        super().__init__()
        self.encoder, self.scale = encoder, scale
        self.tokens, self.channels = encoder.tokens, encoder.channels

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Token ids, computed in float32.

        The image is resized so that a cell is a token, as BEiT and CAE do (224 -> 112 for patches of 16 and a
        stride of 8): bicubic, antialiased, and kept within what bytes can hold.

        Args:
            images: uint8 [B, H, W, C].
            grid: rows and columns.

        Returns:
            int64 [B, rows * columns].
        """
        # A part of the batch at a time: the first group holds `hidden` values per pixel.
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._tokens(part, grid) for part in images.split(_AT_ONCE)])

    def _tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        size = [side * self.encoder.stride for side in grid]
        if size != list(images.shape[1:3]):
            pixels = images.permute(0, 3, 1, 2).float()
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
            images = pixels.clamp(0, 255).permute(0, 2, 3, 1)
        pixels = self.scale.normalize(images).permute(0, 3, 1, 2)
        return self.encoder(pixels).argmax(1).flatten(1)


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer at a path.

    Args:
        source: a run or checkpoint directory of objective dvae, whose averaged weights are preferred; or the file of
            DALL-E's released encoder.

    Raises:
        CheckpointError: none of these.
    """
    path = Path(source)
    if not path.exists():
        raise CheckpointError(
            f"target.tokenizer={source!r} does not exist; expected a run of objective dvae, or the file of DALL-E's "
            "encoder"
        )
    if path.is_file():
        encoder = read_dalle_encoder(path)
        scale = PixelScale([PIXEL_MEAN] * encoder.channels, [PIXEL_STD] * encoder.channels)
        return Tokenizer(encoder, scale)
    folder, manifest = manifests.resolve(path)
    config = recipes.build(manifest["config"])
    if config.objective.name != "dvae":
        raise CheckpointError(
            f"target.tokenizer={source!r} was trained with objective.name={config.objective.name!r}; expected 'dvae'"
        )
    averaged = folder / manifests.EMA_WEIGHTS
    weights = load_file(averaged if averaged.exists() else folder / manifests.WEIGHTS)
    prefix = "encoder."
    with torch.device("meta"):  # nothing is drawn from the generator of the run
        encoder = DVAEEncoder.of(config)
    encoder.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)},
        assign=True,
    )
    return Tokenizer(encoder, PixelScale(config.data.mean, config.data.std))
