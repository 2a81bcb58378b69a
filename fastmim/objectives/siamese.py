"""What R-MAE and C-MAE share: two encodings of an image by complementary masks (Kong & Zhang, CVPR 2023)."""

from torch import Tensor

from fastmim.config import Config
from fastmim.flops import Flops, decoder_flops, encoder_modules
from fastmim.masking import Mask
from fastmim.models import MAEDecoder
from fastmim.objectives.base import Objective


class Siamese(Objective):
    """One encoder on the visible patches and on the removed ones, and a decoder for each branch, or one for both.

    The first branch decodes removed positions from visible patches, as MAE does; the second has seen them.

    Args:
        config: of the run.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__(config, attention)
        self.decoder = MAEDecoder(config, attention)
        self.second_decoder = None if config.objective.share_decoder else MAEDecoder(config, attention)

    def first_branch(self, images: Tensor, mask: Mask) -> Tensor:
        """Features of removed patches that were not seen, [B, M, decoder width], in the order of `mask.ids_mask`."""
        return self.decoder(self.encoder(images, mask), mask.ids_restore, mask.ids_mask)

    def second_branch(self, images: Tensor, mask: Mask) -> Tensor:
        """Features of the same patches from themselves, [B, M, decoder width]."""
        decoder = self.second_decoder or self.decoder
        seen = mask.swapped()
        return decoder(self.encoder(images, seen), seen.ids_restore, mask.ids_mask)

    def first_modules(self) -> dict[str, Flops]:
        """Analytic FLOPs by module of `first_branch`, for one image."""
        return self._branch_modules(self.sampler.keep, "decoder", learned=True)

    def second_modules(self, learned: bool = True) -> dict[str, Flops]:
        """Analytic FLOPs by module of `second_branch`, for one image; no gradients unless `learned`."""
        decoder = "decoder" if self.second_decoder is None else "second_decoder"
        return self._branch_modules(self.patches - self.sampler.keep, decoder, learned)

    def _branch_modules(self, seen: int, decoder: str, learned: bool) -> dict[str, Flops]:
        asked = self.patches - self.sampler.keep
        decoding = Flops.of(decoder_flops(self.config, 1 + seen, asked), gradients=2 if learned else 0)
        return {**encoder_modules(self.config, seen, 1 + seen, learned), decoder: decoding}
