"""The masked autoencoder: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022."""

from torch import Tensor

from fastmim.config import Config
from fastmim.flops import Flops, cross_block_flops, decoder_flops, encoder_modules
from fastmim.kernels.philox import STREAM_SUBSET, philox_4x32
from fastmim.masking import Mask, sample_random_mask
from fastmim.models import CrossDecoder, MAEDecoder
from fastmim.objectives.base import Images, Objective
from fastmim.targets import build_head


class MAE(Objective):
    """Encode the visible patches, decode, and compare the removed patches with their targets.

    With `decoder: cross` positions are decoded by themselves (CrossMAE, Fu et al., TMLR 2025), so that a random
    part of the removed patches can be predicted, `kept_mask_ratio` of all.

    Args:
        config: of the run.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, config: Config, attention: str = "sdpa"):
        objective = config.objective
        super().__init__(config, attention, objective.mask_token_in_encoder)
        self.crosses = objective.decoder == "cross"
        if self.crosses:
            self.decoder = CrossDecoder(config, attention)
        else:
            self.decoder = MAEDecoder(config, attention, mask_token=not objective.mask_token_in_encoder)
        self.head = build_head(config, objective.decoder_width, self.scale)
        self.removed = self.patches - self.sampler.keep
        share = objective.kept_mask_ratio
        left_out = 0 if share is None else int(self.patches * (config.mask.ratio - share))
        self.predicted = self.removed - left_out
        # A key of its own, so that which removed patches are predicted does not follow from which were removed.
        low, high, *_ = philox_4x32(config.train.seed, 0, 0, 0, STREAM_SUBSET)
        self.subset_seed = high << 32 | low

    def forward(self, batch: Images) -> dict[str, Tensor]:
        """The training loss, `{"loss": float32 scalar}`."""
        mask = self.sample_mask(batch.epochs, batch.positions)
        ids = self._predicted_ids(mask, batch.epochs, batch.positions)
        return {"loss": self.head(self.features(batch.images, mask, ids), batch.images, ids).loss}

    def features(self, images: Tensor, mask: Mask, ids: Tensor) -> Tensor:
        """What the head reads for removed patches `ids`, int64 [B, M']: [B, M', decoder width]."""
        if self.crosses:
            return self.decoder(self.encoder(images, mask, every_layer=True), ids)
        return self.decoder(self.encoder(images, mask), mask.ids_restore, ids)

    def loss(self, images: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Mean loss over all removed patches, and the loss of each, float32 [B, M]."""
        return self.head(self.features(images, mask, mask.ids_mask), images, mask.ids_mask)[:2]

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """What the head compares, for all removed patches: [B, M, outputs]."""
        return self.head(self.features(images, mask, mask.ids_mask), None, mask.ids_mask).pred

    def module_flops(self) -> dict[str, Flops]:
        """Analytic FLOPs of one image by module."""
        config, objective, keep = self.config, self.config.objective, self.sampler.keep
        tokens = 1 + (self.patches if objective.mask_token_in_encoder else keep)
        if self.crosses:
            model, width = config.model, objective.decoder_width
            mix = 2 * (1 + model.depth) * tokens * model.width
            block = cross_block_flops(self.predicted, width, tokens, model.width)
            decoder = objective.decoder_depth * (mix + block)
        else:
            decoder = decoder_flops(config, tokens, self.predicted)
        head = Flops.of(self.head.flops(self.predicted))
        return {**encoder_modules(config, keep, tokens), "decoder": Flops.of(decoder), "head": head}

    def _predicted_ids(self, mask: Mask, epochs: Tensor, positions: Tensor) -> Tensor:
        """The removed patches that are predicted in training, int64 [B, M']: all, or a random part of them."""
        if self.predicted == self.removed:
            return mask.ids_mask
        part = sample_random_mask(self.subset_seed, epochs, positions, self.removed, self.predicted)
        return mask.ids_mask.gather(1, part.ids_keep)
