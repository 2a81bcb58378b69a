"""R-MAE ("RelaxMIM"): two encodings of an image agree on what was removed (Kong & Zhang, CVPR 2023)."""

import torch.nn.functional as F
from torch import Tensor

from fastmim.config import Config
from fastmim.flops import Flops, add_modules
from fastmim.masking import Mask
from fastmim.objectives.base import Images
from fastmim.objectives.siamese import Siamese
from fastmim.targets import PixelHead


class RMAE(Siamese):
    """Two predictions of the removed patches agree, and the one that has seen them rebuilds them.

    loss = |first - second|^2 + rebuild_weight |second - pixels|^2, means over removed patches. With a second branch
    that rebuilds without loss it is MAE. The paper's text was not available: its weight, and whether decoders are
    shared or gradients stopped, are configuration.

    Args:
        config: of the run.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__(config, attention)
        objective = config.objective
        self.head = PixelHead(config, objective.decoder_width, self.scale)
        self.second_head = (
            None if objective.share_decoder else PixelHead(config, objective.decoder_width, self.scale)
        )

    def forward(self, batch: Images) -> dict[str, Tensor]:
        """`{"loss", "agree", "rebuild"}`: float32 scalars; the loss is agree + rebuild_weight x rebuild."""
        return self.losses(batch.images, self.sample_mask(batch.epochs, batch.positions))

    def losses(self, images: Tensor, mask: Mask) -> dict[str, Tensor]:
        """What `forward` returns, for given masks."""
        objective = self.config.objective
        first = self.predict(images, mask)
        second = (self.second_head or self.head)(self.second_branch(images, mask), images, mask.ids_mask)
        compared = second.pred.detach() if objective.stop_gradient else second.pred
        agree = F.mse_loss(first.float(), compared.float())
        loss = agree + objective.rebuild_weight * second.loss
        return {"loss": loss, "agree": agree, "rebuild": second.loss}

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """The first branch's predictions of what it has not seen: [B, M, P * P * C]."""
        return self.head(self.first_branch(images, mask), None, mask.ids_mask).pred

    def module_flops(self) -> dict[str, Flops]:
        """Analytic FLOPs of one image by module."""
        head = Flops.of(self.head.flops(self.patches - self.sampler.keep))
        second_head = "head" if self.second_head is None else "second_head"
        return add_modules(self.first_modules(), self.second_modules(), {"head": head}, {second_head: head})
