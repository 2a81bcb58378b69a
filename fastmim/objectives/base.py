"""What every objective has: an encoder, masks, pixel statistics; and what the trainer asks of it."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.flops import Flops
from fastmim.masking import Mask, MaskSampler
from fastmim.models import CrossDecoder, Encoder, Regressor
from fastmim.models.blocks import Blocks
from fastmim.models.pixels import PixelScale
from fastmim.objectives.rebuild import NOTE, fill_removed
from fastmim.targets import Head


class Images(Protocol):
    """What an objective reads of a batch.

    Attributes:
        images: uint8 [B, H, W, C].
        epochs: int64 [B].
        positions: int64 [B].
    """

    images: Tensor
    epochs: Tensor
    positions: Tensor


class Trainable(nn.Module, ABC):
    """Maps a batch to losses: what the trainer asks of whatever it trains.

    Attributes:
        head: what predicts, where there is one.
        stochastic: whether a step draws from torch's generator, which the trainer then seeds by the step.
        progress: share of the run that is done, 0 to 1; the trainer sets it.
    """

    stochastic = False
    progress = 0.0

    def __init__(self):
        super().__init__()
        self.head: Head | None = None

    @abstractmethod
    def forward(self, batch: Images) -> dict[str, Tensor]:
        """The losses of a batch: float32 scalars, "loss" is what is minimised, others are told beside it."""

    def images_to_prepare(self) -> int:
        """How many images `prepare` wants; 0 skips it."""
        return self.head.images_to_prepare() if self.head is not None else 0

    def prepare(self, images: Tensor) -> None:
        """Fit what is fitted before training to uint8 images [n, H, W, C] of the training set, once per run.

        What is fitted must be persistent buffers: they are saved with the weights, and a resumed run reads them.
        """
        if self.head is not None:
            self.head.prepare(images)

    def fingerprints(self) -> dict[str, str]:
        """Of each network that is used and never trained, by the configuration's key that names its weights."""
        frozen = self.head.frozen() if self.head is not None else {}
        return {key: network.fingerprint() for key, network in frozen.items()}

    @abstractmethod
    def module_flops(self) -> dict[str, Flops]:
        """Analytic FLOPs of one image by module: this one's own, and the encoder's `patch_embed` apart."""

    def forward_flops(self) -> int:
        """Analytic FLOPs of the forward pass of one image."""
        return sum(flops.forward for flops in self.module_flops().values())

    def step_flops(self) -> int:
        """Analytic FLOPs of forward and backward of one image."""
        return sum(sum(flops) for flops in self.module_flops().values())

    def compile_blocks(self) -> None:
        """`torch.compile` each transformer block."""
        for module in self.modules():
            if isinstance(module, Blocks | CrossDecoder | Regressor):
                module.compile_layers()

    @abstractmethod
    def sample_mask(self, epochs: Tensor, positions: Tensor) -> Mask:
        """The masks of samples at these epochs and positions, int64 [B] each."""

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """uint8 images [B, H, W, C] with removed patches replaced by predictions; where `Config.draws_pictures`."""
        raise NotImplementedError

    def note_on_pictures(self) -> str:
        """What a viewer must know of `reconstruct`; empty when predictions are plain pixels."""
        return ""


class Objective(Trainable):
    """Owns a ViT encoder of masked images, a decoder and heads. The encoder alone is what is exported.

    Args:
        config: of the run.
        attention: backend, from `choose_attention`.
        mask_token_in_encoder: the encoder sees all positions, removed ones as a learned token.

    Attributes:
        encoder: what is learned.
    """

    def __init__(self, config: Config, attention: str = "sdpa", mask_token_in_encoder: bool = False):
        super().__init__()
        self.config = config
        self.patch_size = config.model.patch_size
        self.stochastic = config.model.drop_path > 0
        self.columns = config.grid[1]
        self.patches = config.grid[0] * self.columns
        self.sampler = MaskSampler(config)
        self.scale = PixelScale(config.data.mean, config.data.std)
        self.encoder = Encoder(config, self.scale, attention, mask_token_in_encoder)

    def sample_mask(self, epochs: Tensor, positions: Tensor) -> Mask:
        """The masks of samples at these epochs and positions, int64 [B] each."""
        return self.sampler(epochs, positions)

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """What the head compares, for all removed patches: [B, M, outputs]; where `Config.draws_pictures`."""
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """uint8 images [B, H, W, C] with removed patches replaced by predictions; where `Config.draws_pictures`."""
        pixels = self.head.to_pixels(self.predict(images, mask))
        return fill_removed(images, mask, pixels, self.patch_size, self.scale, self.head.norm_pix)

    def note_on_pictures(self) -> str:
        """What a viewer must know of `reconstruct`; empty when predictions are plain pixels."""
        return NOTE if self.head is not None and self.head.norm_pix else ""
