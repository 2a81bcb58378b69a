"""CAE v2: Zhang et al., "CAE v2: Context Autoencoder with CLIP Latent Alignment", TMLR 2023."""

import torch
from torch import Tensor

from fastmim.config import Config
from fastmim.flops import Flops, encoder_modules
from fastmim.masking import Mask
from fastmim.models import Regressor
from fastmim.objectives.base import Images, Objective
from fastmim.targets import build_head


class CAEv2(Objective):
    """Regress the latents of removed patches, and compare all positions with a frozen teacher.

    The loss is the mean of 1 - cos over cls, visible and removed positions, which share the head. There is neither
    an alignment nor a decoder.

    Args:
        config: of the run.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__(config, attention)
        self.regressor = Regressor(config, attention)
        self.head = build_head(config, config.model.width, self.scale)

    def forward(self, batch: Images) -> dict[str, Tensor]:
        """The training loss, `{"loss": float32 scalar}`."""
        return self.losses(batch.images, self.sample_mask(batch.epochs, batch.positions))

    def losses(self, images: Tensor, mask: Mask) -> dict[str, Tensor]:
        """The losses of uint8 images [B, H, W, C] under a mask."""
        latent = self.encoder(images, mask)
        x = torch.cat([latent, self.regressor(latent, mask)], dim=1)
        ids = torch.cat([mask.ids_keep, mask.ids_mask], dim=1)
        return {"loss": self.head(x, images, ids).loss}

    def module_flops(self) -> dict[str, Flops]:
        """Analytic FLOPs of one image by module; the teacher has no backward."""
        keep = self.sampler.keep
        return {
            **encoder_modules(self.config, keep, 1 + keep),
            "regressor": Flops.of(self.regressor.flops(keep, self.patches - keep)),
            "teacher": Flops.of(self.head.teacher_flops, gradients=0),
            "head": Flops.of(self.head.flops(self.patches)),
        }
