"""CAE: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", IJCV 2024."""

import torch
from torch import Tensor

from fastmim.config import Config
from fastmim.flops import Flops, add_modules, block_flops, encoder_modules
from fastmim.kernels import mse_align
from fastmim.masking import Mask
from fastmim.models import LatentDecoder, Regressor
from fastmim.objectives.base import Images, Objective
from fastmim.targets import build_head


class CAE(Objective):
    """Regress the latents of removed patches from the visible ones, align them, and decode them alone.

    L = l(G(Z_m), target) + align_weight * MSE(Z_m, stopgrad(Z̄_m)) (equation 1), where l is the cross-entropy of
    visual tokens, or the squared error of pixels. Z̄_m is what the encoder itself makes of the removed patches
    alone. The last norms of regressor and encoder, with their weights, are the formula's LN_r and LN_e.

    Args:
        config: of the run.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__(config, attention)
        self.regressor = Regressor(config, attention)
        self.decoder = LatentDecoder(config, attention)
        self.head = build_head(config, config.model.width, self.scale)
        self.align_weight = config.objective.align_weight

    def forward(self, batch: Images) -> dict[str, Tensor]:
        """The training loss and its parts, `{"loss", "predict", "align"}`; "loss" alone without alignment."""
        return self.losses(batch.images, self.sample_mask(batch.epochs, batch.positions))

    def losses(self, images: Tensor, mask: Mask) -> dict[str, Tensor]:
        """The losses of uint8 images [B, H, W, C] under a mask."""
        # First, so that what this pass holds is freed before the other stores its activations.
        target = self.align_target(images, mask) if self.align_weight else None
        regressed = self.regress(images, mask)
        predict = self.head(self.decoder(regressed, mask.ids_mask), images, mask.ids_mask).loss
        if target is None:
            return {"loss": predict}
        align, _ = mse_align(regressed, target, normalise=False)
        return {"loss": predict + self.align_weight * align, "predict": predict, "align": align}

    def regress(self, images: Tensor, mask: Mask) -> Tensor:
        """Z_m [B, M, D], predicted latents of removed patches, in the order of `mask.ids_mask`."""
        return self.regressor(self.encoder(images, mask), mask)

    @torch.no_grad()
    def align_target(self, images: Tensor, mask: Mask) -> Tensor:
        """Z̄_m [B, M, D]: the encoder on the removed patches only, without stochastic depth and without cls."""
        training = self.encoder.training
        latent = self.encoder.eval()(images, mask.swapped())
        self.encoder.train(training)
        return latent[:, 1:]

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """What the head compares, from predicted latents only: [B, M, outputs]; for pixel targets."""
        return self.head(self.decoder(self.regress(images, mask), mask.ids_mask), None, mask.ids_mask).pred

    def module_flops(self) -> dict[str, Flops]:
        """Analytic FLOPs of one image by module; the encoder's second pass, the alignment target, has no backward."""
        model, keep, removed = self.config.model, self.sampler.keep, self.patches - self.sampler.keep
        decoder = self.config.objective.decoder_depth * block_flops(removed, model.width, model.mlp_ratio)
        learning = {
            **encoder_modules(self.config, keep, 1 + keep),
            "regressor": Flops.of(self.regressor.flops(keep, removed)),
            "decoder": Flops.of(decoder),
            "head": Flops.of(self.head.flops(removed)),
        }
        target = (
            encoder_modules(self.config, removed, 1 + removed, learned=False) if self.align_weight else {}
        )
        return add_modules(learning, target)
