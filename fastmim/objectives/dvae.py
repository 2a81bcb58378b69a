"""The discrete variational autoencoder: Ramesh et al., "Zero-Shot Text-to-Image Generation", ICML 2021.

It masks nothing and has no ViT: trained on the images of a run, it is the tokenizer of `target.kind=tokens`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.config import Config
from fastmim.flops import Flops
from fastmim.masking import Mask
from fastmim.models.blocks import compile_each
from fastmim.models.dvae import DVAEDecoder, DVAEEncoder, ResidualBlock, convolution_flops
from fastmim.models.pixels import PixelScale
from fastmim.objectives.base import Images, Trainable


class DVAE(Trainable):
    """Encode an image to distributions over tokens, draw relaxed tokens, decode, and compare with the image.

    The error of normalised pixels takes the place of the paper's logit-Laplace likelihood.

    Args:
        config: of the run; of `model` and `mask` nothing is read.
        attention: not used; no network here attends.

    Attributes:
        encoder: gives the tokens.
    """

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__()
        self.config = config
        self.stochastic = True
        self.scale = PixelScale(config.data.mean, config.data.std)
        self.encoder = DVAEEncoder.of(config)
        self.decoder = DVAEDecoder.of(config)
        height, width = config.data.image_size
        self.grid = height // self.encoder.stride, width // self.encoder.stride

    def forward(self, batch: Images) -> dict[str, Tensor]:
        """The losses: "rebuild" of the pixels, "kl" to uniform tokens in nats per token, "loss" with both.

        "tokens_used" is how many of the vocabulary are the most likely one anywhere in the batch.
        """
        objective, annealed = self.config.objective, self.annealed()
        first, last = objective.temperature
        pixels, logits = self._encode(batch.images)
        relaxed = F.gumbel_softmax(logits, tau=first + (last - first) * annealed, dim=1)
        compare = F.l1_loss if objective.loss == "l1" else F.mse_loss
        rebuild = compare(self._decode(relaxed), pixels)
        log_share = logits.log_softmax(1)
        kl = (log_share.exp() * (log_share + math.log(objective.tokens))).sum(1).mean()
        loss = rebuild + objective.kl_weight * annealed * kl
        return {
            "loss": loss,
            "rebuild": rebuild.detach(),
            "kl": kl.detach(),
            "tokens_used": self._count_tokens(logits),
        }

    def annealed(self) -> float:
        """From 0 at the start to 1 after the share `anneal` of the run, as a cosine."""
        share = self.config.objective.anneal
        done = min(self.progress / share, 1.0) if share else 1.0
        return 0.5 * (1 - math.cos(math.pi * done))

    def module_flops(self) -> dict[str, Flops]:
        """Analytic FLOPs of one image by module; the first convolution's inputs need no gradient."""
        height, width = self.config.data.image_size
        encoder, pixels = (
            self.encoder.flops(height, width),
            convolution_flops(self.encoder.input, height, width),
        )
        decoder = Flops.of(self.decoder.flops(*self.grid))
        return {"encoder": Flops(encoder, 2 * encoder - pixels), "decoder": decoder}

    def compile_blocks(self) -> None:
        """`torch.compile` each residual block."""
        compile_each([module for module in self.modules() if isinstance(module, ResidualBlock)], keeps=1.0)

    def sample_mask(self, epochs: Tensor, positions: Tensor) -> Mask:
        """Masks that remove nothing."""
        ids = torch.arange(self.grid[0] * self.grid[1], device=positions.device).expand(len(positions), -1)
        return Mask(ids, ids[:, :0], ids, torch.zeros_like(ids, dtype=torch.bool))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """uint8 images [B, H, W, C], decoded from their most likely tokens."""
        _, logits = self._encode(images)
        tokens = F.one_hot(logits.argmax(1), logits.shape[1]).permute(0, 3, 1, 2)
        return self.scale.to_bytes(self._decode(tokens).permute(0, 2, 3, 1))

    def note_on_pictures(self) -> str:
        """That whole images pass through the tokens."""
        return "each image decoded from its most likely tokens"

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels [B, C, H, W] and logits [B, tokens, h, w], both float32."""
        pixels = self.scale.normalize(images).permute(0, 3, 1, 2)
        return pixels, self.encoder(pixels.to(self.encoder.input.weight.dtype)).float()

    def _decode(self, tokens: Tensor) -> Tensor:
        """Distributions [B, tokens, h, w] to float32 pixels."""
        return self.decoder(tokens.to(self.decoder.input.weight.dtype)).float()

    def _count_tokens(self, logits: Tensor) -> Tensor:
        used = logits.new_zeros(logits.shape[1])
        return used.index_fill_(0, logits.argmax(1).flatten(), 1.0).sum()
