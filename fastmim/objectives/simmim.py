"""Mask tokens inside the encoder and a linear head: SimMIM (Xie et al., CVPR 2022), BEiT (Bao et al., ICLR 2022)."""

from torch import Tensor

from fastmim.config import Config
from fastmim.flops import Flops, encoder_modules
from fastmim.kernels import gather_tokens
from fastmim.masking import Mask
from fastmim.objectives.base import Images, Objective
from fastmim.targets import build_head


class SimMIM(Objective):
    """Encode all tokens, removed ones as a learned mask token, and compare what a linear makes of these.

    Mean absolute error of pixels in SimMIM, cross-entropy of visual tokens in BEiT: the head decides. The encoder
    holds all N tokens in both, as in their papers. Positions are this engine's, added sines and cosines, where
    both papers learn a relative bias.

    Args:
        config: of the run.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__(config, attention, mask_token_in_encoder=True)
        self.head = build_head(config, config.model.width, self.scale)

    def forward(self, batch: Images) -> dict[str, Tensor]:
        """The training loss, `{"loss": float32 scalar}`."""
        mask = self.sample_mask(batch.epochs, batch.positions)
        return {"loss": self.loss(batch.images, mask)[0]}

    def features(self, images: Tensor, mask: Mask) -> Tensor:
        """What the head reads: [B, M, D], in the order of `mask.ids_mask`."""
        return gather_tokens(self.encoder(images, mask), mask.ids_mask, offset=1)

    def loss(self, images: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Mean loss over removed patches, and the loss of each, float32 [B, M]."""
        return self.head(self.features(images, mask), images, mask.ids_mask)[:2]

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """What the head compares: [B, M, outputs]."""
        return self.head(self.features(images, mask), None, mask.ids_mask).pred

    def module_flops(self) -> dict[str, Flops]:
        """Analytic FLOPs of one image by module."""
        keep = self.sampler.keep
        head = Flops.of(self.head.flops(self.patches - keep))
        return {**encoder_modules(self.config, keep, 1 + self.patches), "head": head}
