"""C-MAE: two encodings of an image are contrasted on what was removed (Kong & Zhang, CVPR 2023)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.flops import Flops, add_modules, linear_flops
from fastmim.gather_ranks import gather_ranks
from fastmim.kernels import info_nce
from fastmim.masking import Mask
from fastmim.models.blocks import init_weights
from fastmim.objectives.base import Images
from fastmim.objectives.siamese import Siamese


class CMAE(Siamese):
    """The two branches' features of a removed patch find each other among those of all images of the global batch.

    InfoNCE with the first branch as queries: the positive is the second branch's feature of the same patch of the
    same image, negatives are its features of the other removed patches of all images of a backward pass on all
    ranks, compared by the cosine. So `optim.accumulation` takes negatives away, and more ranks do not. The paper's
    text was not available: temperature, projection, sharing and stopped gradients are configuration.

    Args:
        config: of the run.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__(config, attention)
        objective = config.objective
        self.projection = nn.Linear(objective.decoder_width, objective.projection)
        self.second_projection = (
            None if objective.share_decoder else nn.Linear(objective.decoder_width, objective.projection)
        )
        for linear in filter(None, (self.projection, self.second_projection)):
            init_weights(linear)

    def forward(self, batch: Images) -> dict[str, Tensor]:
        """The training loss, `{"loss": float32 scalar}`."""
        return {"loss": self.loss(batch.images, self.sample_mask(batch.epochs, batch.positions))}

    def loss(self, images: Tensor, mask: Mask) -> Tensor:
        """InfoNCE of this rank's removed patches among those of all ranks, float32 scalar."""
        objective = self.config.objective
        # First, so that what a pass without gradient holds is freed before the other stores its activations.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not objective.stop_gradient):
            keys = (self.second_projection or self.projection)(self.second_branch(images, mask))
        queries = self.projection(self.first_branch(images, mask))
        queries, keys = (F.normalize(x.flatten(0, 1), dim=-1) for x in (queries, keys))
        keys, first = gather_ranks(keys)
        labels = torch.arange(first, first + len(queries), device=keys.device)
        return info_nce(queries, keys, labels, objective.temperature)[0]

    def module_flops(self) -> dict[str, Flops]:
        """Analytic FLOPs of one image by module; "contrast" is its similarities to a whole batch.

        A stopped branch, and the keys that it makes, have no backward.
        """
        objective, optim, removed = self.config.objective, self.config.optim, self.patches - self.sampler.keep
        learned = not objective.stop_gradient
        projection = linear_flops(removed, objective.decoder_width, objective.projection)
        keys = optim.batch_size // optim.accumulation * removed
        contrast = linear_flops(removed, objective.projection, keys)
        second = "projection" if self.second_projection is None else "second_projection"
        return add_modules(
            self.first_modules(),
            self.second_modules(learned),
            {"projection": Flops.of(projection)},
            {second: Flops.of(projection, gradients=2 if learned else 0)},
            {"contrast": Flops.of(contrast, gradients=2 if learned else 1)},
        )
